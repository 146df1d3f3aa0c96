"""Environments: this machine's answers, recording, replaying, recordings that are none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.doctor.environment import LARGEST_RECORD, LARGEST_TEXT, Machine, Recorder, Recording
from fstq_infer.doctor.facts import gather, memory_of, swaps_of
from fstq_infer.errors import OptionError


def test_machine(tmp_path: Path) -> None:
    here = Machine()
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson\0")
    (tmp_path / "large").write_bytes(b"x" * (LARGEST_TEXT + 9))
    assert here.read(str(tmp_path / "model")) == "NVIDIA Jetson"
    assert len(here.read(str(tmp_path / "large")) or "") == LARGEST_TEXT
    assert here.read(str(tmp_path / "absent")) is None is here.read(str(tmp_path))
    assert here.glob(f"{tmp_path}/*") == [str(tmp_path / "large"), str(tmp_path / "model")]
    assert here.run("python", "-c", "# greeting\nprint('hello')") == "hello"
    assert here.run("python", "-c", "raise SystemExit(3)") is None is here.run("no-such-program")
    assert "numpy" in here.packages()


def test_a_command_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fstq_infer.doctor.environment.SECONDS", 0.2)
    assert Machine().run("python", "-c", "import time; time.sleep(30)") is None


def test_recording_answers_as_the_machine_did(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    recorder = Recorder(Machine())
    asked = (recorder.read(str(tmp_path / "a")), recorder.glob(f"{tmp_path}/*"), recorder.run("python", "--version"))
    recorder.packages()
    again = Recording.parse(recorder.to_json().encode(), "record")
    assert (again.read(str(tmp_path / "a")), again.glob(f"{tmp_path}/*"), again.run("python", "--version")) == asked
    assert asked[2] == f"Python {sys.version.split()[0]}"
    assert again.packages() == recorder.packages() and again.run("other") is None is again.read("other")


def test_globs_of_a_recording_stay_in_their_folder() -> None:
    files = {"/sys/class/hwmon/hwmon0/name": "ina3221", "/sys/class/hwmon/hwmon0/device/name": "x"}
    assert Recording(files, {}, {}, {}).glob("/sys/class/hwmon/hwmon*/name") == ["/sys/class/hwmon/hwmon0/name"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"format": "fstq-environment", "version": 2}',
        b'{"format": "fstq-environment", "version": 1, "files": []}',
        b'{"format": "fstq-environment", "version": 1, "files": {"a": 1}}',
        b'{"format": "fstq-environment", "version": 1, "paths": {"a": "b"}}',
        b" " * (LARGEST_RECORD + 1),
    ],
    ids=range(10),
)
def test_what_is_no_recording(data: bytes) -> None:
    with pytest.raises(OptionError, match=r"^here[ :].*") as caught:
        Recording.parse(data, "here")
    assert len(str(caught.value)) < 500


text = st.text(max_size=60)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_answers_give_facts(data: st.DataObject) -> None:
    """A machine may say anything: gathering raises nothing."""
    names = ["/proc/device-tree/model", "/etc/nv_tegra_release", "/proc/meminfo", "/proc/buddyinfo", "/proc/swaps"]
    names += ["/etc/nvpmodel.conf", "/usr/local/cuda/version.json", "/sys/class/devfreq/x.gpu/max_freq"]
    names += ["/sys/class/thermal/thermal_zone0/temp", "/sys/class/thermal/thermal_zone0/type"]
    files = {name: data.draw(text) for name in names} | {"/proc/device-tree/compatible": "nvidia,tegra234"}
    commands = {name: data.draw(text) for name in ("python onnxruntime", "python tensorrt", "nvpmodel -q", "id -nG")}
    facts = gather(Recording(files, {}, commands, {}))
    assert facts.profile is None


def test_memory_and_swap() -> None:
    files = {"/proc/meminfo": "MemTotal: 100 kB\nMemFree: 50 kB", "/proc/buddyinfo": "Node 0, zone Normal" + " 1" * 11}
    found = memory_of(Recording(files, {}, {}, {}))
    assert found is not None and (found.total, found.available, found.large_free) == (102400, 51200, 4 << 20)
    assert swaps_of("Filename Type Size Used Priority\n/dev/zram0 partition 10 2 5\nbroken")[0].in_memory


def test_recordings_hold_no_more_than_was_asked(tmp_path: Path) -> None:
    recorder = Recorder(Machine())
    gather(recorder)
    kept = json.loads(recorder.to_json())
    assert set(kept) == {"format", "version", "files", "paths", "commands", "packages"}
    assert all(
        path.startswith(("/proc", "/sys", "/etc/nv", "/usr/local/cuda", "/var/lib/nvpmodel")) for path in kept["files"]
    )
