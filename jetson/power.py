"""Parsers of a Jetson's power, temperature and memory: tegrastats lines, INA sensors in sysfs, jtop. Energy of samples.

A sample has every rail in watts. ``total`` is what the module draws: VDD_IN where the module measures its input (Orin
Nano, Orin NX), else the sum of the rails that feed it (AGX Orin: VDDQ_VDD2_1V8AO is behind VIN_SYS_5V0; AGX Thor: VIN
is the whole developer kit and is kept as a rail).

Line formats: NVIDIA Jetson Linux Developer Guide, "Tegrastats Utility" (r36.4, r38.4); tests hold real lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fstq_infer.doctor.environment import Environment
from fstq_infer.doctor.facts import memory_of
from fstq_infer.errors import FstqError

# The first set whose rails are all there is the module's power.
TOTALS = (
    ("VDD_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
)
UNUSED = ("NC", "sum of shunt voltages")
STEPS = 1000  # milliwatts or millidegrees in one


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment. time: seconds of the meter's clock. rails: watts. temperatures: degrees Celsius. None: not known."""

    time: float
    rails: Mapping[str, float]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    gpu_load: float | None = None
    gpu_mhz: float | None = None
    ram_mb: tuple[int, int] | None = None
    largest_free_mb: tuple[int, int] | None = None

    @property
    def total(self) -> float | None:
        """Watts of the module, None where its rails are not all there."""
        for names in TOTALS:
            if all(name in self.rails for name in names):
                return sum(self.rails[name] for name in names)
        return None


class LineError(FstqError):
    """A line is not one of tegrastats."""


RAM = re.compile(r"\bRAM (\d+)/(\d+)MB(?: \(lfb (\d+)x(\d+)MB\))?")
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (-?\d+)mW(?:/-?\d+mW)*")
OLD_RAIL = re.compile(r"\b((?:VDD|POM|VIN)_[A-Z0-9_]+) (\d+)/\d+(?![\dM])")  # before JetPack 5: no unit
HEAT = re.compile(r"\b([A-Za-z][A-Za-z0-9]*)@(-?\d+(?:\.\d+)?)(?:/-?[\d.]+)?C\b")
GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+))?")
OFF = -256.0  # a zone that is switched off


def parse_line(line: str, at: float = 0.0) -> Sample:
    """A tegrastats line of any Jetson. Raises LineError for another line.

    Of the figures of a rail (now/average, on newer releases now/average/peak) the first is taken: averages run since
    tegrastats was started.
    """
    memory = RAM.search(line)
    if memory is None:
        raise LineError(f"no tegrastats line: {line.strip()[:80]!a}; expected one with RAM used/total")
    rails: dict[str, float] = {}
    for name, value in (*OLD_RAIL.findall(line), *RAIL.findall(line)):
        if name not in UNUSED:
            rails[name] = int(value) / STEPS
    gpu = GPU.search(line)
    heat = {name.lower(): float(value) for name, value in HEAT.findall(line)}
    return Sample(
        time=at,
        rails=rails,
        temperatures={name: value for name, value in heat.items() if value > OFF},
        gpu_load=float(gpu[1]) if gpu and gpu[1] else None,
        gpu_mhz=float(gpu[2]) if gpu and gpu[2] else None,
        ram_mb=(int(memory[1]), int(memory[2])),
        largest_free_mb=(int(memory[3]), int(memory[4])) if memory[3] else None,
    )


def read_sensors(env: Environment, at: float = 0.0) -> Sample:
    """From /sys/class/hwmon (INA3221, INA238): in*_label, in*_input (mV), curr*_input (mA); without them no rails."""
    rails = {}
    for chip in env.glob("/sys/class/hwmon/hwmon*/name"):
        if not (env.read(chip) or "").startswith("ina"):
            continue
        folder = chip.rpartition("/")[0]
        for path in env.glob(f"{folder}/in*_label"):
            label, number = env.read(path) or "", path.rpartition("/in")[2].partition("_")[0]
            volts, amperes = (env.read(f"{folder}/{kind}{number}_input") or "" for kind in ("in", "curr"))
            if label and label not in UNUSED and _whole(volts) and _whole(amperes):
                rails[label] = int(volts) * int(amperes) / STEPS**2
    heat = {}
    for path in env.glob("/sys/class/thermal/thermal_zone*/temp"):
        name, value = env.read(path.replace("/temp", "/type")) or "", env.read(path) or ""
        if name and _whole(value):
            heat[name.removesuffix("-thermal")] = int(value) / STEPS
    memory = memory_of(env)
    used = (round((memory.total - memory.available) / 2**20), round(memory.total / 2**20)) if memory else None
    return Sample(at, rails, heat, ram_mb=used)


def from_jtop(power: Mapping[str, object], temperature: Mapping[str, object], at: float = 0.0) -> Sample:
    """What ``jtop.power`` and ``jtop.temperature`` of jetson-stats 4 hold: rails in mW, sensors with ``temp``."""
    rails, heat = {}, {}
    for name, entry in _items(power.get("rail")):
        value = entry.get("power")
        if isinstance(value, int | float) and name not in UNUSED:
            rails[name] = value / STEPS
    for name, entry in _items(temperature):
        value = entry.get("temp")
        if isinstance(value, int | float) and entry.get("online", True) and value > OFF:
            heat[name.lower()] = float(value)
    return Sample(at, rails, heat)


def _items(table: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    for name, entry in (table if isinstance(table, Mapping) else {}).items():
        if isinstance(entry, Mapping):
            yield str(name), entry


def _whole(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


def energy(samples: Sequence[Sample], began: float, ended: float) -> dict[str, float]:
    """Joules of every rail, and of ``total``, between two moments: each sample holds until the next one.

    Empty where no sample lies at or before the end.
    """
    joules: dict[str, float] = {}
    for index, sample in enumerate(samples):
        since = sample.time if index else min(sample.time, began)
        until = samples[index + 1].time if index + 1 < len(samples) else ended
        seconds = min(until, ended) - max(since, began)
        if seconds > 0:
            values = dict(sample.rails) | ({} if sample.total is None else {"total": sample.total})
            for name, watts in values.items():
                joules[name] = joules.get(name, 0.0) + watts * seconds
    return joules
