"""Device profiles: memory, bandwidth, peak rates by number type and power modes. Data, no measurement.

The files lie in ``jetson/profiles`` of the repository and in ``fstq_infer/profiles`` of an installed wheel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fstq_infer.errors import OptionError, suggestion
from fstq_infer.quant.toml import Table, load

FORMAT, VERSION = "fstq-device", 1
LARGEST = 64 << 10
PUBLISHED = "published"  # the file beside the profiles with measured speeds
NUMBERS = ("fp32", "fp16", "int8", "fp8", "fp4")


@dataclass(frozen=True, slots=True)
class Mode:
    """A power mode: GPU clock in MHz, streaming multiprocessors that are on, memory bandwidth in bytes/s."""

    name: str
    gpu_mhz: float
    sms: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the roofline assumes of software: shares of the peaks that it reaches, and fixed costs.

    bandwidth, compute: in (0, 1]. layer_seconds: launches of one decoder layer. prefill_seconds: what a call with a
    prompt takes beside its kernels. runtime_bytes: context and libraries. system_bytes: operating system.
    """

    bandwidth: float
    compute: float
    layer_seconds: float
    prefill_seconds: float
    runtime_bytes: int
    system_bytes: int


@dataclass(frozen=True, slots=True)
class Profile:
    """One device in one power mode.

    memory: bytes that Linux has. peak: operations/s (a multiply-add is two) of each number type at the fastest clock
    with all SMs. models, memory_range (bytes): how the device is recognised.
    """

    name: str
    title: str
    sm: str
    memory: int
    formats: tuple[str, ...]
    peak: Mapping[str, float]
    peak_mhz: float
    peak_sms: int
    modes: Mapping[str, Mode]
    mode: Mode
    estimate: Estimate
    models: tuple[str, ...]
    memory_range: tuple[float, float]

    def in_mode(self, name: str) -> Profile:
        """The same device in another power mode. Raises OptionError with a suggestion."""
        found = next((mode for key, mode in self.modes.items() if key.casefold() == name.casefold()), None)
        if found is None:
            meant = suggestion(name, self.modes, "its modes are")
            raise OptionError(f"{self.name} has no power mode {name!a}; {meant}")
        return replace(self, mode=found)

    def flops(self, number: str) -> float:
        """Operations per second in this mode. Raises OptionError for a number type that the device lacks."""
        if number not in self.peak:
            raise OptionError(
                f"{self.title} (SM {self.sm}) does not compute in {number}; it has {', '.join(self.peak)}"
            )
        return self.peak[number] * self.mode.gpu_mhz / self.peak_mhz * self.mode.sms / self.peak_sms


def folder() -> Path:
    """Where the profiles are. Raises OptionError when the installation lacks them."""
    here = Path(__file__).resolve().parent
    for place in (here / "profiles", here.parent / "jetson" / "profiles"):
        if place.is_dir():
            return place
    raise OptionError(
        f"no device profiles beside {here}; this installation of fstq-infer is not whole: install it again"
    )


def names() -> tuple[str, ...]:
    """Of all devices."""
    return tuple(sorted(path.stem for path in folder().glob("*.toml") if path.stem != PUBLISHED))


def find(name: str) -> Profile:
    """The profile of that name, or of that file if ``name`` ends with .toml. Raises OptionError with a suggestion."""
    if name.endswith(".toml"):
        path = Path(name)
        return parse(_read(path), path.stem, str(path))
    if name not in names():
        raise OptionError(f"there is no device {name!a}; {suggestion(name, names(), 'the devices are')}")
    return parse(_read(folder() / f"{name}.toml"), name, f"{name}.toml")


def matching(model: str, memory: int) -> Profile | None:
    """The profile of a device-tree model and its memory in bytes; None for another machine."""
    for name in names():
        profile = find(name)
        low, high = profile.memory_range
        if low <= memory <= high and any(text in model for text in profile.models):
            return profile
    return None


def parse(data: bytes, name: str, place: str) -> Profile:
    """Raises OptionError naming ``place`` and what is wrong, whatever the input."""
    return parsed(load(data, place, LARGEST, "a device profile such as those in jetson/profiles"), place, name)


def parsed(data: Mapping[str, Any], place: str, name: str | None = None) -> Profile:
    """Of a file's TOML tables; its name is the file's where none is given. Errors as :func:`parse`."""
    top = Table(data, place)
    top.format(FORMAT, VERSION)
    top.only(
        *("format", "version", "title", "sm", "memory_gib", "formats", "default", "match", "peak", "modes", "estimate")
    )
    peak = _table(top, "peak")
    peak.only("gpu_mhz", "sms", *NUMBERS)
    rates = {number: 1e12 * peak.number(number, above=True) for number in NUMBERS if number in peak.data}
    for needed in ("fp32", "fp16"):
        if needed not in rates:
            raise OptionError(f"{peak.place}: {needed!a} is missing")
    mhz, sms = peak.number("gpu_mhz", above=True), peak.count("sms") or 1
    modes = {
        key: _mode(Table(value, f"{place}, mode {key!a:.40}"), key, sms)
        for key, value in top.value("modes", dict).items()
    }
    default = top.value("default", str)
    if default not in modes:
        raise OptionError(f"{place}: the default mode {default!a:.40} is none of its modes")
    match = _table(top, "match")
    match.only("models", "memory_gib")
    return Profile(
        name=Path(place).stem if name is None else name,
        title=top.value("title", str),
        sm=top.value("sm", str),
        memory=round(top.number("memory_gib", above=True) * 2**30),
        formats=_texts(top, "formats"),
        peak=rates,
        peak_mhz=mhz,
        peak_sms=sms,
        modes=modes,
        mode=modes[default],
        estimate=_estimate(_table(top, "estimate")),
        models=_texts(match, "models"),
        memory_range=_range(match, "memory_gib"),
    )


def published() -> dict[str, Any]:
    """Table of published speeds: ``models`` by name, ``rows``."""
    path = folder() / f"{PUBLISHED}.toml"
    return load(_read(path), path.name, LARGEST, "the table that comes with fstq-infer")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(LARGEST + 1)
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error}; give a device's name or a profile's file") from error


def _table(table: Table, key: str) -> Table:
    return Table(table.value(key, dict), f"{table.place}, {key}")


def _texts(table: Table, key: str) -> tuple[str, ...]:
    found = table.value(key, list)
    if not found or not all(isinstance(item, str) for item in found):
        raise OptionError(f"{table.place}: {key!a} must be a list of texts that is not empty, found {found!a:.80}")
    return tuple(found)


def _share(table: Table, key: str) -> float:
    value = table.number(key, above=True)
    if value > 1:
        raise OptionError(f"{table.place}: {key!a} is a share of the peak, above 0 and at most 1; found {value}")
    return value


def _mode(table: Table, name: str, sms: int) -> Mode:
    table.only("gpu_mhz", "sms", "bandwidth_gbs")
    on = table.count("sms") if "sms" in table.data else sms
    if not 1 <= on <= sms:
        raise OptionError(f"{table.place}: 'sms' must be 1 to {sms}, found {on}")
    return Mode(name, table.number("gpu_mhz", above=True), on, 1e9 * table.number("bandwidth_gbs", above=True))


def _estimate(table: Table) -> Estimate:
    table.only("bandwidth", "compute", "layer_us", "prefill_ms", "runtime_gib", "system_gib")
    return Estimate(
        bandwidth=_share(table, "bandwidth"),
        compute=_share(table, "compute"),
        layer_seconds=table.number("layer_us") * 1e-6,
        prefill_seconds=table.number("prefill_ms") * 1e-3,
        runtime_bytes=round(table.number("runtime_gib") * 2**30),
        system_bytes=round(table.number("system_gib") * 2**30),
    )


def _range(table: Table, key: str) -> tuple[float, float]:
    found = table.value(key, list)
    if len(found) != 2 or not all(isinstance(item, int | float) for item in found) or not found[0] < found[1]:
        raise OptionError(f"{table.place}: {key!a} must be two rising numbers, found {found!a:.80}")
    return found[0] * 2**30, found[1] * 2**30
