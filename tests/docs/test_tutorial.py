"""The tutorial's commands, run as they stand; those for a board are left out. The site builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, SHELL, blocks

PAGE = "docs/tutorial/rag.md"
LEFT_OUT = ("Install", "(not tried")  # in the heading above


def scripts() -> list[str]:
    """What a laptop's user types after the installation, block by block."""
    return [
        block.text
        for block in blocks(PAGE)
        if block.language in SHELL and not any(word in block.heading for word in LEFT_OUT)
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with `fstq` and `python` of this interpreter, and a cache of its own."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, arguments in (("fstq", "-m fstq_infer"), ("python", "")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (binaries / name).chmod(0o755)
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": paths, "FSTQ_CACHE": str(tmp_path / "cache")}


def test_there_is_much_to_run() -> None:
    assert sum(script.count("fstq ") for script in scripts()) >= 5


@pytest.mark.slow
def test_tutorial(tmp_path: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("mobius", reason="the tutorial exports a model, which needs the 'export' extra")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "export").symlink_to(ROOT / "export")
    said = ""
    for script in scripts():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=3600,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    rows = dict(re.findall(r"^ *(1\.0|0\.5) +\d+% +(\d+)% +[\d.]+$", said, re.MULTILINE))
    assert set(rows) == {"1.0", "0.5"}, said
    assert int(rows["1.0"]) >= 80, said  # right answers, %, of 100 questions; dense and with half of the prompt
    assert int(rows["0.5"]) >= int(rows["1.0"]) - 10, said
