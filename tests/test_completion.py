"""Shell completion, asked as shells ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fstq_infer import device
from fstq_infer.bundle import BundleWriter
from fstq_infer.cli import complete
from tests.adapters.samples import ports, write
from tests.bundles import BARE, fill

FSTQ = (sys.executable, "-m", "fstq_infer")


def words(line: str) -> list[str]:
    """What bash is offered for the last word of a command line."""
    asked = {"_FSTQ_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(FSTQ, capture_output=True, text=True, check=False, env={**os.environ, **asked})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_commands_and_options() -> None:
    assert words("fstq b") == ["build", "bench"]
    assert "--keep" in words("fstq run --k")
    assert words("fstq adapter ") == ["add", "list", "remove"]


def test_devices_targets_formats_and_backends() -> None:
    assert words("fstq plan --device orin-n") == [name for name in device.names() if name.startswith("orin-n")]
    assert words("fstq plan --device al") == ["all"]
    assert words("fstq lint b --target th") == ["thor"]
    assert words("fstq export m --precision int4") == ["int4", "int4-64", "int4-128", "int4-128-dynamic"]
    assert words("fstq run b --backend tensorrt") == ["tensorrt", "tensorrt-rtx"]


def test_adapters_of_the_bundle_before(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        model = replace(BARE.model, layers=2, dtype="float32")
        writer.commit(replace(BARE, model=model, stages=(), pruning=replace(BARE.pruning, keep=1.0), lora=ports()))
    medical = write(tmp_path / "medical")
    subprocess.run([*FSTQ, "adapter", "add", str(tmp_path / "b"), str(medical)], check=True, capture_output=True)
    assert words(f"fstq run {tmp_path / 'b'} prompt --adapter ") == ["medical"]
    assert words(f"fstq adapter remove {tmp_path / 'b'} m") == ["medical"]
    assert words(f"fstq run {tmp_path / 'none'} prompt --adapter ") == []


def test_lists_are_those_that_the_commands_know() -> None:
    pytest.importorskip("fstq_engines.tensorrt.module")
    from fstq_engines.tensorrt.module import TARGETS

    from fstq_infer.quant.formats import FORMATS

    assert set(complete.TARGETS) == set(TARGETS)
    assert set(complete.PRECISIONS) - {"auto", "int4"} <= set(FORMATS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_for_shells(shell: str) -> None:
    asked = {"_FSTQ_COMPLETE": f"source_{shell}"}
    done = subprocess.run(FSTQ, capture_output=True, text=True, check=False, env={**os.environ, **asked})
    assert done.returncode == 0 and "_FSTQ_COMPLETE=complete_" in done.stdout, done.stderr
