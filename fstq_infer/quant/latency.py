"""How long matrices take on a device: measured there, by a board's data sheet, or by a roofline; budgets of time.

Knows times of kernels by shape, format and number of tokens, no graph and no backend. The file is TOML, for people, and
read back strictly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fstq_infer import device as boards
from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import CPU_FORMATS, FORMATS, named
from fstq_infer.quant.toml import Table, load, number, text
from fstq_infer.roofline import linear_seconds

FORMAT, VERSION = "fstq-profile", 1
LARGEST = 4 << 20  # bytes of a profile's text
MOST = 20_000  # kernels in one
DYNAMIC_RATE = 3.5  # int8 inputs and weights over float32, many tokens: 22.4 and 85 ms at 896 x 4,864 x 1,024


@dataclass(frozen=True, slots=True)
class Target:
    """A budget: seconds for the prefill of a prompt of ``tokens`` tokens, or for each decoded token where it is 1."""

    seconds: float
    tokens: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf or self.tokens < 1:
            raise OptionError(
                f"a target of {self.seconds:g} seconds for {self.tokens} tokens is not possible; both must be above 0"
            )

    @classmethod
    def parse(cls, given: str) -> Target:
        """``SECONDS`` or ``SECONDS@PROMPT``."""
        seconds, _, tokens = given.partition("@")
        try:
            return cls(float(seconds), int(tokens or 1))
        except ValueError as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(
                f"--target-latency is {given!a:.60}; expected seconds for a decoded token, such as 0.02, or seconds "
                "and the length of a prompt, such as 0.5@1024"
            ) from None

    def __str__(self) -> str:
        return f"{self.seconds:g} s for " + ("a decoded token" if self.tokens == 1 else f"{self.tokens} prompt tokens")


Kernel = tuple[int, int, str, int]  # outputs, inputs, format, tokens


class Costs(Protocol):
    """What matrices take on a device."""

    @property
    def device(self) -> str:
        """In words."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Those that it has."""

    def seconds(self, outputs: int, inputs: int, form: str, tokens: int) -> float:
        """Of one matrix for ``tokens`` tokens."""


def costs_on(name: str) -> Costs:
    """Of a board by its name, with a power mode or without (orin-nano, orin-nano@15W), or by a file: a board's, or one
    that was measured. Raises OptionError."""
    if not name.endswith(".toml"):
        board, _, mode = name.partition("@")
        return Board(boards.find(board).in_mode(mode) if mode else boards.find(board))
    try:
        with open(name, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise OptionError(
            f"the profile {name} cannot be read: {error}; write one on the device with 'fstq build --profile', or name "
            f"a board: {', '.join(boards.names())}"
        ) from error
    return costs_in(data, name)


def costs_in(data: bytes, place: str) -> Costs:
    """Of a file's content. Raises OptionError naming ``place`` and what is wrong, whatever the input."""
    found = load(data, place, LARGEST, "a board's profile, or one as 'fstq build --profile' writes it")
    return Board(boards.parsed(found, place)) if found.get("format") == boards.FORMAT else Profile.parsed(found, place)


@dataclass(frozen=True, slots=True)
class Board:
    """A board from its data sheet, see :mod:`fstq_infer.roofline`."""

    board: boards.Profile

    @property
    def device(self) -> str:
        """In words."""
        return f"roofline of {self.board.title}, {self.board.mode.name}"

    @property
    def formats(self) -> tuple[str, ...]:
        """Those that it has."""
        return self.board.formats

    def seconds(self, outputs: int, inputs: int, form: str, tokens: int) -> float:
        """By bytes moved or operations done, whichever takes longer."""
        return linear_seconds(self.board, outputs, inputs, form, tokens)


@dataclass(frozen=True, slots=True)
class Roofline:
    """bandwidth: bytes read in a second. rate: multiplications and additions of float32 in a second, each for one."""

    bandwidth: float
    rate: float

    def seconds(self, outputs: int, inputs: int, form: str, tokens: int) -> float:
        """The longer of reading the weights and computing with them."""
        format = FORMATS[form]
        rate = self.rate * (DYNAMIC_RATE if format.inputs == 0 else 1.0)
        return max(format.bytes(outputs, inputs) / self.bandwidth, 2.0 * outputs * inputs * tokens / rate)

    @classmethod
    def measured(cls) -> Roofline:
        """Of NumPy on this machine, in a fraction of a second: sums over 64 MiB, and products of 512 x 512."""
        data, square = np.ones(16 << 20, np.float32), np.ones((512, 512), np.float32)
        return cls(data.nbytes / _least(data.sum), 2.0 * 512**3 / _least(lambda: square @ square))


def _least(work: object) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured on a device. kernels: median seconds. device: processor, backend and threads, in words."""

    device: str
    roofline: Roofline
    kernels: Mapping[Kernel, float] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[str, ...]:
        """Those that it has; where one was not measured, the roofline stands in."""
        return CPU_FORMATS

    def seconds(self, outputs: int, inputs: int, form: str, tokens: int) -> float:
        """As measured; between measured numbers of tokens, and beyond the most, in proportion; else by roofline."""
        own = sorted((n, s) for (o, i, f, n), s in self.kernels.items() if (o, i, f) == (outputs, inputs, form))
        if not own:
            return self.roofline.seconds(outputs, inputs, form, tokens)
        counts, times = [count for count, _ in own], [seconds for _, seconds in own]
        if tokens <= counts[-1]:
            return float(np.interp(tokens, counts, times))
        return times[-1] * tokens / counts[-1]

    def to_toml(self) -> str:
        """The same text for equal profiles."""
        lines = [
            "# Device profile, by 'fstq build --profile': median seconds of a matrix's kernel.",
            f"format = {text(FORMAT)}",
            f"version = {VERSION}",
            f"device = {text(self.device)}",
            f"bandwidth = {number(self.roofline.bandwidth)}",
            f"rate = {number(self.roofline.rate)}",
        ]
        for (outputs, inputs, form, tokens), seconds in sorted(self.kernels.items()):
            lines += [
                "",
                "[[kernels]]",
                f"outputs = {outputs}",
                f"inputs = {inputs}",
                f"format = {text(form)}",
                f"tokens = {tokens}",
                f"seconds = {number(seconds)}",
            ]
        return "\n".join(lines) + "\n"

    @classmethod
    def parsed(cls, data: Mapping[str, Any], place: str) -> Profile:
        """Of a file's TOML tables. Raises OptionError naming ``place`` and what is wrong."""
        top = Table(data, place)
        top.format(FORMAT, VERSION)
        top.only("format", "version", "device", "bandwidth", "rate", "kernels")
        kernels: dict[Kernel, float] = {}
        rows = top.value("kernels", list) if "kernels" in top.data else []
        if len(rows) > MOST:
            raise OptionError(f"{place} has {len(rows)} kernels; at most {MOST} are read")
        for index, row in enumerate(rows):
            table = Table(row, f"{place}, kernel {index + 1}")
            table.only("outputs", "inputs", "format", "tokens", "seconds")
            form = table.checked(lambda name: named(name).name, table.value("format", str))
            sizes = [table.count(key, 1) for key in ("outputs", "inputs", "tokens")]
            kernels[sizes[0], sizes[1], form, sizes[2]] = table.number("seconds", above=True)
        rates = Roofline(top.number("bandwidth", above=True), top.number("rate", above=True))
        return cls(top.value("device", str), rates, kernels)
