"""The doctor on recorded machines: golden outputs, and each trap with what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fstq_infer.doctor import command, hardware, software
from fstq_infer.doctor.facts import Clock, Facts, Memory, Power, Swap, gather, jetpack_of, l4t_of
from fstq_infer.doctor.findings import SEVERITIES, Finding
from fstq_infer.errors import OptionError
from tests.jetson.scripts import ENVIRONMENTS, GOLDEN, environment

NAMES = sorted(path.stem for path in ENVIRONMENTS.glob("*.json"))
REMAKE = "if the change is meant, run tests/golden/jetson/make.py and read the difference"
GIB = 2**30


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = ENVIRONMENTS / f"{name}.json"
    code = command.doctor(json=False, record=None, replay=path)
    assert capsys.readouterr().out + f"exit code {code}\n" == (GOLDEN / f"doctor-{name}.txt").read_text(), REMAKE
    assert command.doctor(json=True, record=None, replay=path) == code
    text = capsys.readouterr().out
    assert text == (GOLDEN / f"doctor-{name}.json").read_text(), REMAKE
    assert (json.loads(text)["errors"] > 0) == bool(code)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_wrong_says_what_to_do(name: str) -> None:
    for finding in command.examine(gather(environment(name))):
        assert finding.severity in SEVERITIES and finding.found
        assert finding.todo or finding.severity in ("ok", "info"), finding


def test_five_boards_are_recognised() -> None:
    profiles = {name: gather(environment(name)).profile for name in NAMES}
    found = {name: profile.name for name, profile in profiles.items() if profile}
    assert found == {name: name for name in ("agx-orin-64gb", "orin-nano", "orin-nx-16gb", "thor")}


@pytest.fixture
def nano() -> Facts:
    return gather(environment("orin-nano"))


def only(findings: list[Finding], check: str) -> Finding:
    (finding,) = (one for one in findings if one.check == check)
    return finding


def test_jetpack_releases(nano: Facts) -> None:
    known = {(35, "4.1"): "5", (36, "3.0"): "6.0", (36, "4.3"): "6.1 or 6.2", (36, "5.0"): "6.2", (38, "2.0"): "7.0"}
    known |= {(38, "4.0"): "7.1", (39, "2.1"): "7.2", (77, "1"): "unknown", (36, "9"): "6"}
    assert {l4t: jetpack_of(l4t) for l4t in known} == known
    assert l4t_of("# R39 (release), REVISION: 2.1, GCID: 1") == (39, "2.1") and l4t_of("nonsense") is None
    for l4t, core, severity in (
        ((35, "4.1"), "35.4.1-1", "error"),
        ((77, "1"), "77.1-1", "info"),
        ((36, "4.3"), "36.5.0-2026", "warning"),
        (None, "", "warning"),
    ):
        assert software.jetpack(replace(nano, l4t=l4t, debian={"nvidia-l4t-core": core}))[0].severity == severity


@pytest.mark.parametrize(
    ("change", "check", "severity", "words"),
    [
        ({"cuda": None}, software.cuda, "warning", "no CUDA toolkit"),
        ({"cuda": "13.0.0"}, software.cuda, "warning", "of CUDA 12"),
        ({"debian": {}}, software.tensorrt, "error", "not installed"),
        ({"tensorrt": "8.6.2", "debian": {}}, software.tensorrt, "error", "older than 10.3"),
        (
            {"tensorrt": "10.13.0", "packages": {"tensorrt": "10.13.0"}},
            software.tensorrt,
            "error",
            "from a wheel, JetPack's library is 10.3",
        ),
        ({"onnxruntime": None, "packages": {}}, software.onnxruntime, "error", "not installed"),
        ({"onnxruntime": None}, software.onnxruntime, "error", "cannot be imported"),
        ({"packages": {"numpy": "2.2", "onnxruntime": "1.18.0"}}, software.wheels, "error", "built for NumPy 1"),
        ({"packages": {"nvidia-cudnn-cu12": "9"}}, software.wheels, "warning", "other ARM servers"),
        ({"packages": {"tensorrt-rtx": "1.7"}}, software.wheels, "warning", "neither on Orin"),
        ({"python": "3.8.10"}, software.wheels, "error", "older than 3.10"),
        ({"profile": None}, software.device, "warning", "no profile"),
        ({"memory": None}, hardware.memory, "info", "not known"),
        ({"memory": Memory(8 * GIB, GIB, GIB, None)}, hardware.memory, "warning", "1.0 of 8.0 GiB"),
        ({"swaps": (Swap("/swap", 8 * GIB, 0),)}, hardware.swap, "ok", "8.0 GiB"),
        ({"power": None}, hardware.power, "info", "not known"),
        ({"power": Power("MODE_30W", {0: "MODE_15W", 1: "MODE_30W"})}, hardware.power, "ok", "MODE_30W"),
        ({"power": Power("25W", {0: "10W", 1: "25W", 2: "40W"})}, hardware.power, "warning", "40W"),
        ({"clock": None}, hardware.clocks, "info", "cannot be read"),
        ({"clock": Clock(10**9, 10**9, 10**9)}, hardware.clocks, "ok", "locked"),
        ({"temperatures": {"tj": 96.0}}, hardware.heat, "warning", "throttled"),
        ({"gpu_nodes": False, "container": True}, hardware.access, "error", "no GPU device files"),
        ({"power_sources": ()}, hardware.measuring, "info", "will lack power"),
    ],
)
def test_traps(nano: Facts, change: dict[str, Any], check: Any, severity: str, words: str) -> None:
    finding = check(replace(nano, **change))[0]
    assert finding.severity == severity and words in finding.found, finding


def test_container_is_told_the_runtime(nano: Facts) -> None:
    inside = hardware.access(replace(nano, gpu_nodes=False, container=True))[0]
    assert "--runtime nvidia" in inside.todo
    assert "reboot" in hardware.access(replace(nano, gpu_nodes=False, container=False))[0].todo


def test_fallback_of_tensorrt_alone_is_no_error(nano: Facts) -> None:
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    sessions = {names[0]: ["CPUExecutionProvider"], names[1]: names[1:]}
    found = software.onnxruntime(
        replace(nano, onnxruntime={"version": "1.24", "available": names, "sessions": sessions})
    )
    assert only(found, "onnxruntime-fallback").severity == "info"
    assert only(found, "onnxruntime").severity == "ok"


def test_checks_of_a_jetson_say_nothing_elsewhere() -> None:
    laptop = gather(environment("laptop"))
    quiet = (software.jetpack, software.cuda, hardware.fragments, hardware.swap, hardware.power, hardware.clocks)
    assert [check(laptop) for check in (*quiet, hardware.access, hardware.measuring)] == [[]] * 8


def test_this_machine_and_its_recording(tmp_path: Path) -> None:
    record = tmp_path / "here.json"
    base = [sys.executable, "-m", "fstq_infer", "doctor", "--json"]
    first = subprocess.run([*base, "--record", str(record)], capture_output=True, text=True, check=False)
    again = subprocess.run([*base, "--replay", str(record)], capture_output=True, text=True, check=False)
    assert first.returncode in (0, 1), first.stderr
    assert (again.stdout, again.returncode) == (first.stdout, first.returncode)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.json cannot be read"):
        command.doctor(json=True, record=None, replay=Path("nowhere.json"))
    with pytest.raises(OptionError, match="cannot be written"):
        command.doctor(json=True, record=tmp_path / "laptop" / "\0", replay=ENVIRONMENTS / "laptop.json")
