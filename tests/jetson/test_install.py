"""jetson/install.sh: what it runs on each JetPack, what it refuses; shellcheck. jetson/Dockerfile names what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jetson.scripts import ROOT

SCRIPT = ROOT / "jetson" / "install.sh"
bash = shutil.which("bash")
pytestmark = pytest.mark.skipif(bash is None, reason="needs bash")


def install(
    *options: str, folder: Path, release: str | None = "36", machine: str = "aarch64", user: str = "1000"
) -> subprocess.CompletedProcess[str]:
    """Runs the script as if on a device: uname and id answer what is asked of them."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, answer in (("uname", machine), ("id", user)):
        (programs / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (programs / name).chmod(0o755)
    file = folder / "nv_tegra_release"
    if release is not None:
        file.write_text(f"# R{release} (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "NV_TEGRA_RELEASE": str(file),
        "HOME": str(folder),
    }
    command = [str(bash), str(SCRIPT), "--python", sys.executable, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def steps(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize(("release", "jetpack"), [("36", "6"), ("38", "7"), ("39", "7")])
def test_commands(tmp_path: Path, release: str, jetpack: str) -> None:
    done = install("--dry-run", folder=tmp_path, release=release)
    assert done.returncode == 0, done.stderr
    assert f"Jetson Linux {release}, JetPack {jetpack}" in done.stdout
    made, upgraded, installed, doctor = steps(done)
    assert made == f"{sys.executable} -m venv --system-site-packages {tmp_path}/fstq-venv"
    assert upgraded.endswith("-m pip install --upgrade pip")
    cuda = "cuda-python<13" if jetpack == "6" else "cuda-python"
    assert installed.endswith(f"-m pip install {ROOT}[ort,tensorrt] {cuda}")
    assert doctor == f"{tmp_path}/fstq-venv/bin/fstq doctor"
    assert not (tmp_path / "fstq-venv").exists()


def test_wheel_index(tmp_path: Path) -> None:
    options = ("--wheel-index", "https://wheels.example/jp6", "--runtime-version", "1.23.0", "--source", "fstq-infer")
    done = install("--dry-run", "--venv", str(tmp_path / "v"), *options, folder=tmp_path)
    _, _, runtime, package, _ = steps(done)
    assert runtime.endswith("install --no-deps --index-url https://wheels.example/jp6 onnxruntime-gpu==1.23.0")
    assert package == f"{tmp_path}/v/bin/python -m pip install fstq-infer[ort-gpu,tensorrt] cuda-python<13"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"release": "35"}, "Jetson Linux 35 is not supported"),
        ({"release": None}, "does not name a release"),
        ({"machine": "x86_64"}, "expected aarch64"),
        ({"user": "0"}, "running as root"),
    ],
)
def test_doubts(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    done = install("--dry-run", folder=tmp_path, **changes)  # type: ignore[arg-type]
    assert done.returncode == 1 and words in done.stderr and "--force" in done.stderr and not steps(done)
    forced = install("--dry-run", "--force", folder=tmp_path, **changes)  # type: ignore[arg-type]
    assert forced.returncode == 0 and words in forced.stderr and steps(forced)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--wheel",), "no option --wheel"),
        (("--venv",), "--venv needs a value"),
        (("--python", "no-such-python"), "no-such-python is not there"),
    ],
)
def test_wrong_options(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = install(*options, folder=tmp_path)
    assert done.returncode == 1 and words in done.stderr


def test_help(tmp_path: Path) -> None:
    done = install("--help", folder=tmp_path)
    assert done.returncode == 0 and "--wheel-index" in done.stdout


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; it comes with the 'dev' extra")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_host_but_nvidias() -> None:
    for path in (SCRIPT, ROOT / "jetson" / "Dockerfile"):
        hosts = re.findall(r"\b[a-z0-9.-]+\.(?:io|com|dev|org)\b", path.read_text())
        assert set(hosts) <= {"nvcr.io"}


def test_dockerfile_copies_what_there_is() -> None:
    text = (ROOT / "jetson" / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    options = set(re.findall(r"--[a-z-]+", text.partition("install.sh")[2])) - {"--wheel-index", "--runtime-version"}
    assert options <= set(re.findall(r"--[a-z-]+", SCRIPT.read_text()))
