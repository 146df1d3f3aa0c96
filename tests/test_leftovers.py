"""fstq_infer.atomic's files, and fstq_infer.leftovers: writers that are killed, at work elsewhere, or many at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fstq_infer import leftovers
from fstq_infer.atomic import replace_file, staged_file

from .bundles import listing, posix

STAGING = """
import signal, sys
from pathlib import Path
from fstq_infer.atomic import staged_file
with staged_file(Path(sys.argv[1]), b"half"):
    print("ready", flush=True)
    signal.pause()
"""


def staging(path: Path) -> subprocess.Popen[str]:
    """A process that has written its data and not put it in place."""
    process = subprocess.Popen([sys.executable, "-c", STAGING, str(path)], stdout=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    process.send_signal(how)
    process.communicate()


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@posix
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    killed, other = staging(path), staging(path)
    end(killed, signal.SIGKILL)
    assert len(listing(tmp_path)) == 2 and not path.exists()
    replace_file(path, b"whole")
    left = listing(tmp_path) - {"a.json"}
    assert path.read_bytes() == b"whole"
    assert [name.startswith(f".a.json.partial-{other.pid}-") for name in left] == [True]  # it is at work
    end(other, signal.SIGINT)
    assert listing(tmp_path) == {"a.json"}


@posix
def test_only_leftovers_of_the_same_name_go(tmp_path: Path) -> None:
    dead, alive = gone(), os.getppid()
    keep = {f".b.json.partial-{dead}-00000000", ".a.json.partial-x", f".a.json.partial-{dead}-0000000g"}
    keep |= {f".a.json.partial-{alive}-00000000", f"a.json.partial-{dead}"}
    drop = {f".a.json.partial-{dead}", f".a.json.partial-{dead}-00000000", f".a.json.partial-{os.getpid()}-00000000"}
    drop |= {f".a.json.partial-{alive}-00000001"}
    for name in keep | drop:
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / f".a.json.partial-{alive}-00000001", (0, 0))  # that process did not write it
    (tmp_path / f".a.json.partial-{dead}-00000001").mkdir()
    (tmp_path / f".a.json.partial-{dead}-00000002").symlink_to("a.json")
    keep |= {f".a.json.partial-{dead}-00000001", f".a.json.partial-{dead}-00000002"}
    replace_file(tmp_path / "a.json", b"whole")
    assert listing(tmp_path) == {"a.json"} | keep


@posix
@pytest.mark.parametrize("age", [0.0, 1e9])
def test_a_locked_file_stays_whatever_its_process_id_and_age(tmp_path: Path, age: float) -> None:
    fcntl = pytest.importorskip("fcntl")
    partial = tmp_path / f".a.json.partial-{gone()}-00000000"
    partial.write_bytes(b"half")
    os.utime(partial, (2e9 - age,) * 2)
    with partial.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # a live writer in another container: its process id means nothing here
        replace_file(tmp_path / "a.json", b"whole")
        assert listing(tmp_path) == {"a.json", partial.name}
    replace_file(tmp_path / "a.json", b"again")
    assert listing(tmp_path) == {"a.json"}


@posix
def test_where_locks_do_not_work_process_ids_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "fcntl", None)
    dead, own, old = (tmp_path / f".a.json.partial-{pid}-00000000" for pid in (gone(), os.getpid(), os.getppid()))
    for partial in (dead, own, old):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))
    replace_file(tmp_path / "a.json", b"whole")
    assert listing(tmp_path) == {"a.json", own.name, old.name}


def test_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    path, contents = tmp_path / "a.json", [bytes([65 + number]) * 10_000 for number in range(8)]
    with staged_file(path, b"first") as first, staged_file(path, b"second") as second:
        second()
        first()
    assert path.read_bytes() == b"first"

    def work(content: bytes) -> None:
        for _ in range(20):
            replace_file(path, content)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and listing(tmp_path) == {"a.json"}


@posix
def test_a_file_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer clears it between its making and its lock."""
    cleared: list[str] = []

    def clearing(descriptor: int) -> None:
        if not cleared:
            cleared.extend(listing(tmp_path))
            (tmp_path / cleared[0]).unlink()

    monkeypatch.setattr("fstq_infer.atomic.lock_file", clearing)
    replace_file(tmp_path / "a.json", b"whole")
    assert len(cleared) == 1 and listing(tmp_path) == {"a.json"}
    assert (tmp_path / "a.json").read_bytes() == b"whole"


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_of_a_write_that_was_given_up(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "a.json").write_bytes(b"old")
    with pytest.raises(stop), staged_file(tmp_path / "a.json", b"new"):
        raise stop
    assert listing(tmp_path) == {"a.json"} and (tmp_path / "a.json").read_bytes() == b"old"
