"""fstq_infer.bundle.BundleWriter and fstq_infer.atomic: what is written and refused, and writers that are killed."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fstq_infer
from fstq_infer import errors
from fstq_infer.bundle import Bundle, BundleWriter, atomic_directory
from fstq_infer.manifest import REQUIRED_FILES
from fstq_infer.runtime.engine import Stage

from .bundles import BARE, fill, listing, make, posix, write


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole")


# ---- writer ------------------------------------------------------------------------------------------------------


def test_writer(tmp_path: Path) -> None:
    out = tmp_path / "new" / "b"
    with BundleWriter(out) as writer:
        assert writer.path.name == f".b.partial-{os.getpid()}"
        fill(writer.path)
        assert not out.exists()
        written = writer.commit(BARE)
        assert written == Bundle.open(out)
    assert listing(out.parent) == {"b"} and listing(out) == {*make.CONTENT, "manifest.json"}
    assert written.manifest == replace(BARE, files=written.manifest.files)
    with BundleWriter(tmp_path / "again") as writer:
        fill(writer.path)
        assert writer.commit(BARE).manifest_sha256 == written.manifest_sha256


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit, None])
def test_leaving_without_commit_removes_everything(tmp_path: Path, stop: type[BaseException] | None) -> None:
    def work() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            fill(writer.path)
            if stop:
                raise stop

    if stop:
        with pytest.raises(stop):
            work()
    else:
        work()
    assert listing(tmp_path) == set()


def test_existing_output(whole: Path) -> None:
    before = Bundle.open(whole)
    with pytest.raises(errors.BundleExistsError, match="--force"):
        BundleWriter(whole).__enter__()
    with BundleWriter(whole, overwrite=True) as writer:
        fill(writer.path, REQUIRED_FILES)
        assert Bundle.open(whole) == before
        after = writer.commit(BARE)
    assert listing(whole.parent) == {"whole"}
    assert Bundle.open(whole) == after != before and not (whole / "report.html").exists()


def test_overwrite_takes_only_bundles_and_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    write(tmp_path / "whole")
    (tmp_path / "link").symlink_to("whole")
    before = listing(tmp_path)
    for name in ("photos", "file", "link"):
        with pytest.raises(errors.BundleExistsError, match="will not be replaced"):
            BundleWriter(tmp_path / name, overwrite=True).__enter__()
    assert listing(tmp_path) == before
    (tmp_path / "empty").mkdir()
    with BundleWriter(tmp_path / "empty", overwrite=True) as writer:
        fill(writer.path)
        writer.commit(BARE)
    Bundle.open(tmp_path / "empty")


@pytest.mark.parametrize("out", ["/", "..", "", "nul\0"])
def test_no_output_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.BundleError):
        BundleWriter(out).__enter__()


def test_output_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for out in (tmp_path / "file" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(errors.BundleError, match="choose another path"):
            BundleWriter(out).__enter__()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("notes.txt", "BundlePathError"),
        ("manifest.json", "BundlePathError"),
        ("chat_template.jinja", "BundleSizeError"),
    ],
)
def test_commit_refuses_what_no_reader_would_take(tmp_path: Path, name: str, error: str) -> None:
    with pytest.raises(getattr(errors, error)), BundleWriter(tmp_path / "b") as writer:
        fill(writer.path, REQUIRED_FILES)
        (writer.path / name).write_bytes(bytes((256 << 10) + 1))
        writer.commit(BARE)
    assert listing(tmp_path) == set()


def test_commit_refuses_a_wrong_manifest(tmp_path: Path) -> None:
    wrong = [
        replace(BARE, pruning=replace(BARE.pruning, keep=0.0)),
        replace(BARE, generation=replace(BARE.generation, temperature=float("inf"))),
        replace(BARE, stages=(Stage(2, 0, 0), Stage(1, 0, 0))),
        replace(BARE, provenance=replace(BARE.provenance, libraries={str(i): "v" * 4000 for i in range(300)})),
    ]
    for number, manifest in enumerate(wrong):
        kind = errors.BundleSizeError if number == 3 else errors.ManifestError
        with pytest.raises(kind), BundleWriter(tmp_path / "b") as writer:
            fill(writer.path)
            writer.commit(manifest)
    missing = pytest.raises(errors.ManifestError, match=r"'tokenizer.json' in 'files' is missing")
    with missing, BundleWriter(tmp_path / "b") as writer:
        fill(writer.path, ("model.onnx", "report.json"))
        writer.commit(BARE)
    assert listing(tmp_path) == set()


def test_commit_once_and_inside(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "b")
    with writer:
        fill(writer.path)
        writer.commit(BARE)
        with pytest.raises(errors.BundleError):
            writer.commit(BARE)
    with pytest.raises(errors.BundleError):
        writer.commit(BARE)
    Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_old_bundle_is_restored_when_the_rename_fails(
    whole: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    before, rename = Bundle.open(whole), os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((errors.BundleError, KeyboardInterrupt)), BundleWriter(whole, overwrite=True) as writer:
        fill(writer.path, REQUIRED_FILES)
        writer.commit(BARE)
    assert Bundle.open(whole) == before and listing(whole.parent) == {"whole"}


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleExistsError), BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        (tmp_path / "b").mkdir()
        writer.commit(BARE)
    assert listing(tmp_path) == {"b"}


def test_atomic_directory(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with atomic_directory(out, marker="engine.json") as path:
        (path / "sub").mkdir()
        (path / "sub" / "engine.json").write_text("1")
    assert (out / "sub" / "engine.json").read_text() == "1"
    with pytest.raises(errors.BundleExistsError, match=r"no engine\.json"), atomic_directory(out, True, "engine.json"):
        pass
    (out / "engine.json").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_directory(out, True, "engine.json"):
        raise ZeroDivisionError
    assert (out / "sub").exists()
    with atomic_directory(out, True, "engine.json"):
        pass
    assert listing(out) == set() and listing(tmp_path) == {"engine"}


# ---- killed writers ----------------------------------------------------------------------------------------------


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that has run ``code`` up to its print('ready')."""
    path = os.pathsep.join([str(Path(fstq_infer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


WRITING = """
import signal, sys, time
from fstq_infer.bundle import BundleWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with BundleWriter(sys.argv[1]) as writer:
    (writer.path / "model.onnx").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def ended(process: subprocess.Popen[str]) -> int:
    with process:
        return process.wait(20)


@posix
def test_kill_leaves_no_bundle_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    process = child(WRITING, str(tmp_path / "b"))
    leftover = f".b.partial-{process.pid}"
    with BundleWriter(tmp_path / "b") as writer:  # it is alive: nothing of it is touched
        assert listing(tmp_path) == {leftover, writer.path.name}
    process.kill()
    ended(process)
    assert listing(tmp_path) == {leftover}
    with BundleWriter(tmp_path / "other"):
        assert leftover in listing(tmp_path)
    with BundleWriter(tmp_path / "b") as writer:
        assert listing(tmp_path) == {writer.path.name}
        fill(writer.path)
        writer.commit(BARE)
    Bundle.open(tmp_path / "b")


@posix
def test_ctrl_c_removes_the_partial_directory(tmp_path: Path) -> None:
    process = child(WRITING, str(tmp_path / "b"))
    process.send_signal(signal.SIGINT)
    assert ended(process) != 0
    assert listing(tmp_path) == set()


DYING_BETWEEN_RENAMES = """
import os, signal, sys
from fstq_infer.atomic import atomic_directory
rename = os.rename
def dying(source, target):
    if ".partial-" in str(source):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = dying
with atomic_directory(sys.argv[1], overwrite=True):
    print("ready", flush=True)
"""


@posix
def test_bundle_set_aside_by_a_killed_writer_comes_back(whole: Path) -> None:
    before = Bundle.open(whole)
    process = child(DYING_BETWEEN_RENAMES, str(whole))
    ended(process)
    assert listing(whole.parent) == {f".whole.{kind}-{process.pid}" for kind in ("partial", "old")}
    with pytest.raises(errors.BundleExistsError):
        BundleWriter(whole).__enter__()
    assert Bundle.open(whole) == before and listing(whole.parent) == {"whole"}


@posix
def test_only_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    process = child("print('ready', flush=True)")
    ended(process)
    keep = {f".b.partial-{os.getppid()}", ".b.partial-x", ".b.partial-", ".bb.partial-1", ".b.partial-1.zip"}
    keep |= {f".B.old-{process.pid}", f".b.old-{process.pid}0000000000", f".b.partial-{process.pid}"}
    gone = {f".b.partial-{os.getpid()}", f".b.old-{process.pid}"}  # an own process id: containers reuse them
    for name in keep | gone:
        (tmp_path / name).mkdir()
    (tmp_path / "b").mkdir()
    locked = os.open(tmp_path / f".b.partial-{process.pid}", os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)  # a live writer in another container: its process id means nothing here
    try:
        with BundleWriter(tmp_path / "b", overwrite=True) as writer:
            assert listing(tmp_path) == {"b", writer.path.name} | keep
    finally:
        os.close(locked)


def test_two_writers_of_one_process(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as first:
        with pytest.raises(errors.BundleExistsError, match="already"):
            BundleWriter(tmp_path / "b").__enter__()
        fill(first.path)
        first.commit(BARE)
    Bundle.open(tmp_path / "b")


def test_manifest_on_disk_is_the_spec(tmp_path: Path) -> None:
    """The writer's JSON has the keys and values of make.py's, which was written from the spec alone."""
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        writer.commit(BARE)
    expected = copy.deepcopy(make.manifest())
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == expected
