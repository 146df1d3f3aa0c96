"""Parsers of power on real lines of every board, sysfs as it is laid out there, jtop's dictionaries; energy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.doctor.environment import Recording
from tests.jetson.scripts import JETSONS, LOGS, environment, lines, script

power = script("power")

EXPECTED = {  # of each board's first and last line: watts of the module, rails, hottest zone, RAM, largest free blocks
    "orin-nano": [(5.704, 3, 48.843, (2461, 7620), (3, 2)), (4.541, 3, 50.0, (1483, 7620), (105, 4))],
    "orin-nx-16gb": [(7.956, 3, 52.375, (3941, 15656), (6, 4)), (12.673, 3, 58.937, (6567, 15656), (54, 4))],
    "agx-orin-64gb": [(6.755, 4, 44.562, (4321, 62801), (1759, 4)), (22.43, 4, 77.281, (13983, 62780), (424, 4))],
    "thor": [(13.484, 4, 38.875, (105265, 125772), (34, 4)), (83.484, 4, 66.625, (8353, 125749), (31, 4))],
    "older": [(5.297, 6, 50.0, (3276, 7859), (5, 4)), (5.079, 3, 50.0, (2690, 6854), (6, 1))],
}


@pytest.mark.parametrize("board", sorted(EXPECTED))
def test_real_lines(board: str) -> None:
    found = lines(board)
    for line, (total, rails, hottest, ram, free) in zip((found[0], found[-1]), EXPECTED[board], strict=True):
        sample = power.parse_line(line, 7.0)
        assert sample.time == 7.0
        assert sample.total == pytest.approx(total)
        assert len(sample.rails) == rails and "NC" not in sample.rails
        assert max(sample.temperatures.values()) == hottest and min(sample.temperatures.values()) > 0
        assert (sample.ram_mb, sample.largest_free_mb) == (ram, free)


def test_gpu_load_and_clock() -> None:
    nano, thor = (power.parse_line(lines(board)[-1]) for board in ("orin-nano", "thor"))
    assert (nano.gpu_load, nano.gpu_mhz) == (62, 612)
    assert (thor.gpu_load, thor.gpu_mhz) == (87, 1574)
    idle = power.parse_line(lines("thor")[0])
    assert (idle.gpu_load, idle.gpu_mhz) == (None, 314)
    without = power.parse_line(lines("thor")[1])
    assert (without.gpu_load, without.gpu_mhz) == (None, None)


def test_average_and_peak_are_left_out() -> None:
    sample = power.parse_line(lines("thor")[-1])
    assert sample.rails["VDD_GPU"] == 37.939 and sample.rails["VIN"] == 124.486


def test_negative_readings_are_kept() -> None:
    """Calibration offsets of an idle Thor: VDD_GPU -392mW in public captures."""
    sample = power.parse_line("RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972] VDD_GPU -392mW/-392mW VIN 15004mW/15096mW")
    assert sample.rails == {"VDD_GPU": -0.392, "VIN": 15.004} and sample.total is None


@pytest.mark.parametrize("line", ["", "hello", "# comment", "RAM lots", "Filename Type Size"])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(power.LineError, match="expected one with RAM"):
        power.parse_line(line)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for line in (text, f"RAM 1/2MB {text}", f"{lines('thor')[0][: len(text)]}{text}"):
        try:
            sample = power.parse_line(line)
        except power.LineError:
            continue
        assert all(math.isfinite(watts) for watts in sample.rails.values())


def test_every_log_names_its_source() -> None:
    for path in LOGS.glob("*.log"):
        assert path.read_text().startswith("# Real lines of ")


TOTALS = {"orin-nano": 5.705, "orin-nx-16gb": 7.961, "agx-orin-64gb": 6.75988, "thor": 13.48845}


@pytest.mark.parametrize("name", JETSONS)
def test_sensors_of_recorded_devices(name: str) -> None:
    sample = power.read_sensors(environment(name), 3.0)
    assert sample.total == pytest.approx(TOTALS[name], rel=1e-4)
    assert "NC" not in sample.rails and sample.temperatures["cpu"] > 30
    assert sample.ram_mb is not None and 0 < sample.ram_mb[0] < sample.ram_mb[1]


def test_sensors_skip_what_is_no_power_monitor_or_cannot_be_read() -> None:
    files = {
        "/sys/class/hwmon/hwmon0/name": "pwmfan",
        "/sys/class/hwmon/hwmon0/in1_label": "VDD_FAN",
        "/sys/class/hwmon/hwmon0/in1_input": "5000",
        "/sys/class/hwmon/hwmon0/curr1_input": "5000",
        "/sys/class/hwmon/hwmon1/name": "ina3221",
        "/sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
        "/sys/class/hwmon/hwmon1/in1_input": "",
        "/sys/class/hwmon/hwmon1/curr1_input": "100",
        "/sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
        "/sys/class/hwmon/hwmon1/in7_input": "760",
        "/sys/class/hwmon/hwmon1/curr7_input": "1",
    }
    assert power.read_sensors(Recording(files, {}, {}, {})).rails == {}


def test_jtop() -> None:
    """Shapes of jetson-stats 4: jtop.power has rail and tot, jtop.temperature zones with temp and online."""
    rail = {
        "VDD_CPU_GPU_CV": {"volt": 5000, "curr": 100, "power": 500, "avg": 480},
        "VDD_IN": {"power": 5200},
        "NC": {"power": 0},
    }
    heat = {"CPU": {"temp": 44.5, "online": True}, "gpu": {"temp": -256, "online": False}, "tj": {"temp": 45}}
    sample = power.from_jtop({"rail": rail, "tot": {"power": 5200}}, heat, 1.0)
    assert sample.rails == {"VDD_CPU_GPU_CV": 0.5, "VDD_IN": 5.2} and sample.total == 5.2
    assert sample.temperatures == {"cpu": 44.5, "tj": 45.0}
    assert power.from_jtop({}, {}).rails == {} == power.from_jtop({"rail": [1]}, {"cpu": 3}).rails


def test_energy_by_hand() -> None:
    samples = [power.Sample(at, {"VDD_IN": watts}) for at, watts in ((0.0, 1.0), (1.0, 2.0), (2.0, 4.0))]
    assert power.energy(samples, 0.5, 2.5) == {"VDD_IN": 0.5 + 2.0 + 2.0, "total": 4.5}
    assert power.energy(samples, -1.0, 0.5)["VDD_IN"] == 1.5  # the first sample stands for the time before it
    assert power.energy(samples, 3.0, 4.0)["VDD_IN"] == 4.0
    assert power.energy([], 0, 1) == {} == power.energy(samples, 5.0, 5.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.tuples(*[st.floats(0, 30)] * 3))
def test_energy_of_parts_is_that_of_the_whole(watts: list[float], cuts: tuple[float, ...]) -> None:
    samples = [power.Sample(float(at), {"VDD_IN": one}) for at, one in enumerate(watts)]
    low, middle, high = sorted(cuts)
    parts = [power.energy(samples, *span).get("VDD_IN", 0.0) for span in ((low, middle), (middle, high))]
    assert sum(parts) == pytest.approx(power.energy(samples, low, high).get("VDD_IN", 0.0), abs=1e-6)
