"""Where output goes: pipes whose reader has gone, full disks, narrow and plain terminals, Ctrl-C while loading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fstq_infer import __version__, terminal
from tests.bundles import posix

FSTQ = (sys.executable, "-m", "fstq_infer")
COMMANDS = (["--version"], ["--help"], ["plan", "--check"], ["plan", "--check", "--json"], ["run", "--help"])


def start(*arguments: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*FSTQ, *arguments], check=False, **streams)  # type: ignore[call-overload,no-any-return]


@posix
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_pipe_whose_reader_has_gone(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = start(*arguments, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (terminal.PIPE_CLOSED, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = start(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


def test_version_is_for_bug_reports() -> None:
    first, system, libraries = start("--version", stdout=subprocess.PIPE).stdout.decode().splitlines()
    assert first == f"fstq-infer {__version__}"
    assert sys.version.split()[0] in system and "numpy " in libraries


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    quiet, loud = (
        start(*more, "run", str(tmp_path / "none"), "x", stderr=subprocess.PIPE).stderr for more in ([], ["-v"])
    )
    assert b"Traceback" not in quiet and b"Traceback" in loud


def test_errors_and_tables_are_not_wrapped_in_a_pipe() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = start("plan", "nowhere" * 40, "--device", "thor", stderr=subprocess.PIPE, env=environment)
    assert done.stderr.count(b"\n") == 1
    table = start("plan", "--check", stdout=subprocess.PIPE, env=environment).stdout.decode()
    assert "\u2026" not in table  # no cell is cut


@pytest.mark.parametrize("setting", ["NO_COLOR", "TERM", "nothing"])
def test_no_escapes_where_no_terminal_is(setting: str) -> None:
    done = start("plan", "--check", stdout=subprocess.PIPE, env={**os.environ, setting: "dumb"})
    assert done.returncode == 0 and b"\x1b" not in done.stdout


def test_letters_that_the_encoding_lacks() -> None:
    done = start("plan", "--check", stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.isascii()


@posix
def test_ctrl_c_while_modules_are_loaded() -> None:
    """From the moment on at which the entry point runs, no traceback."""
    code = (
        "import os, signal, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from fstq_infer.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


def test_arguments_are_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.argument("M\u00fcller") == "M\u00fcller"
    broken = "M\udcc3\udcbcller"
    assert terminal.argument(broken) == "M\u00fcller"
    assert terminal.argument("\udcff") == "\udcff"  # no UTF-8 either: the tokenizer says so
