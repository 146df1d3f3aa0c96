"""How many coordinates of each tensor are sent, and with how many bits. Counts and codes out; bytes are counted later.

Rates are modelled (entropy of a Bernoulli support, bits of the code); compress.py compares with the bytes a message
really has and asks again with other ``bits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError
from fstq_infer.federated.quantize import quantizer
from fstq_infer.federated.select import Floats, Ints, top

SCALE_BITS = 16
SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """What an allocation may look at: (N,) scores and (N,) update, (N,) Fisher weights or None, (T,) sizes."""

    scores: Floats
    update: Floats
    fisher: Floats | None
    sizes: Ints


@dataclass(frozen=True, slots=True)
class Plan:
    """For L layers and T tensors. counts: (L, T) coordinates. choice: (L, T) keys of ``names``, 0 where none is sent.

    names: number -> quantizer. Layer 0 takes each tensor's best coordinates, layer 1 the next, and so on.
    """

    counts: Ints
    choice: NDArray[Any]
    names: Mapping[int, str]


class Allocation(Protocol):
    """Plans a message of about ``bits`` bits; None: as many as the allocation's own settings ask for."""

    def plan(self, problem: Problem, bits: float | None) -> Plan: ...


def support_bits(counts: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.float64]:
    """Entropy of Bernoulli supports with ``counts`` of ``sizes`` coordinates, in bits."""
    p = np.clip(counts / sizes, 0, 1)
    inside = (p > 0) & (p < 1)
    p = np.where(inside, p, 0.5)
    return np.where(inside, -sizes * (p * np.log2(p) + (1 - p) * np.log2(1 - p)), 0.0)


def _counts_of(chosen: Ints, sizes: Ints) -> Ints:
    """(T,) how many of the ascending indices lie in each tensor."""
    edges = np.searchsorted(chosen, np.concatenate(([0], np.cumsum(sizes))))
    return np.diff(edges)


@dataclass(frozen=True, slots=True)
class Fixed:
    """The best ``density`` of all coordinates with one quantizer; fewer where the bits do not suffice."""

    density: float = 0.05
    quantizer: str = "lloyd2"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise OptionError(f"a density lies above 0 and is at most 1, found {self.density}")
        quantizer(self.quantizer)

    def plan(self, problem: Problem, bits: float | None) -> Plan:
        return _by_share(problem, bits, (self.density,), (self.quantizer,))


@dataclass(frozen=True, slots=True)
class Everything:
    """All coordinates with one quantizer, or an error: for a codec that must not leave anything out."""

    quantizer: str = "fp32"

    def plan(self, problem: Problem, bits: float | None) -> Plan:
        needed = len(problem.scores) * quantizer(self.quantizer).code.bits
        if bits is not None and needed > bits:
            raise OptionError(
                f"all coordinates as {self.quantizer} need more than {needed // 8} bytes, the budget leaves "
                f"{int(bits // 8)}. Raise the budget or choose a lossy allocation."
            )
        return Plan(problem.sizes[None], np.ones((1, len(problem.sizes)), np.int64), {1: self.quantizer})


@dataclass(frozen=True, slots=True)
class Percentile:
    """The rule of Fed-FSTQ (arXiv 2604.25421): bits 16, 4, 2 and 0 by percentile of the score over all coordinates.

    shares: of all coordinates with each code, the best first. Under a budget all shares shrink alike.
    """

    shares: tuple[float, ...] = (0.005, 0.015, 0.03)
    quantizers: tuple[str, ...] = ("fp16", "uniform4", "uniform2")

    def plan(self, problem: Problem, bits: float | None) -> Plan:
        return _by_share(problem, bits, self.shares, self.quantizers)


def _by_share(problem: Problem, bits: float | None, shares: tuple[float, ...], names: tuple[str, ...]) -> Plan:
    total, factor = len(problem.scores), 1.0
    each = [quantizer(name).code.bits for name in names]

    def rate(factor: float) -> float:
        sizes, left = [share * factor * total for share in shares], float(total)
        cost = 0.0
        for count, width in zip(sizes, each, strict=True):
            cost += float(support_bits(np.array(count), np.array(left))) + count * width
            left -= count
        return cost

    if bits is not None and rate(1.0) > bits:
        low, high = 0.0, 1.0
        for _ in range(40):
            factor = (low + high) / 2
            low, high = (factor, high) if rate(factor) <= bits else (low, factor)
        factor = low
    ends = [int(edge) for edge in np.cumsum(shares) * (factor * total) + 1e-6]
    inside = [_counts_of(top(problem.scores, end), problem.sizes) for end in ends]
    counts = np.stack(inside)
    counts[1:] -= counts[:-1].copy()
    numbers = np.arange(1, len(names) + 1)[:, None]
    return Plan(counts, np.where(counts > 0, numbers, 0), dict(enumerate(names, 1)))


@dataclass(frozen=True, slots=True)
class WaterFilling:
    """Density and bits of each tensor by reverse water-filling over {0, 1, 2, 3, 4, 8, 16} bits.

    Of all (density, bits) pairs a tensor takes the one that removes most weighted squared error minus the water level
    times its bits; the level is the one at which the message has the wanted size. That is where a greedy choice of the
    steepest steps along the tensors' convex hulls ends (Shoham and Gersho, 1988). Errors are estimated from a sample.
    """

    widths: tuple[int, ...] = (1, 2, 3, 4, 8, 16)

    def plan(self, problem: Problem, bits: float | None) -> Plan:
        if bits is None:
            raise OptionError("water-filling divides a budget, but none was given. Pass budget=BYTES.")
        names = {width: "bf16" if width == 16 else f"lloyd{width}" for width in self.widths}
        counts, gain, rate = self._options(problem)
        best = self._level(gain, rate, bits)
        rows = np.arange(len(best))
        sent = np.where(best >= 0, counts[rows, best // len(self.widths)], 0)
        width = np.where(sent > 0, np.array(self.widths)[best % len(self.widths)], 0)
        return Plan(sent[None], width[None], names)

    def _options(self, problem: Problem) -> tuple[Ints, NDArray[np.float64], NDArray[np.float64]]:
        """(T, D) counts; (T, D x B) squared error removed and (T, D x B) bits."""
        sizes = problem.sizes
        draws = np.random.default_rng(0).random((len(sizes), SAMPLES))
        index = (np.cumsum(sizes) - sizes)[:, None] + (draws * sizes[:, None]).astype(np.int64)
        order = np.argsort(-problem.scores[index], axis=1, kind="stable")
        magnitude = np.take_along_axis(np.abs(problem.update[index]).astype(np.float64), order, axis=1)
        weight = np.ones_like(magnitude)
        if problem.fisher is not None:
            weight = np.take_along_axis(problem.fisher[index].astype(np.float64), order, axis=1)
        cuts = np.unique(np.geomspace(1, SAMPLES, 28).astype(np.int64))
        sums = [np.cumsum(weight * magnitude**power, axis=1)[:, cuts - 1] for power in range(3)]
        counts = np.maximum(sizes[:, None] * cuts // SAMPLES, 1)
        # One magnitude leaves the spread of those kept; each further bit halves the cells, a quarter of the error.
        spread = 1 - sums[1] ** 2 / np.maximum(sums[0] * sums[2], 1e-300)
        left = np.array([0.0 if width == 16 else 0.25 ** (width - 1) for width in self.widths])
        share = (counts / cuts)[:, :, None]
        gain = share * sums[2][:, :, None] * (1 - np.clip(spread, 0.02, 1)[:, :, None] * left)
        rate = (
            support_bits(counts, sizes[:, None])[:, :, None] + counts[:, :, None] * np.array(self.widths) + SCALE_BITS
        )
        return counts, gain.reshape(len(sizes), -1), rate.reshape(len(sizes), -1)

    @staticmethod
    def _level(gain: NDArray[np.float64], rate: NDArray[np.float64], bits: float) -> Ints:
        """(T,) best option of each tensor, -1 for none, at the lowest water level that needs at most ``bits``."""
        rows = np.arange(len(gain))

        def choose(level: float) -> tuple[Ints, float]:
            worth = gain - level * rate
            best = np.argmax(worth, axis=1)
            best = np.where(worth[rows, best] > 0, best, -1)
            return best, float(rate[rows, best][best >= 0].sum())

        high = float((gain / rate).max()) * 2 + 1e-300
        low, best = high * 1e-15, choose(high)[0]
        for _ in range(60):
            level = float(np.sqrt(low * high))
            found, needed = choose(level)
            if needed <= bits:
                high, best = level, found
            else:
                low = level
        return best


ALLOCATIONS: Mapping[str, Allocation] = {
    "water": WaterFilling(),
    "fixed": Fixed(),
    "paper": Percentile(),
    "lossless": Everything(),
}


def allocation(name: str) -> Allocation:
    """A row by name. Raises OptionError with the names there are."""
    if name not in ALLOCATIONS:
        raise OptionError(f"there is no allocation {name!a}; choose one of {', '.join(ALLOCATIONS)}")
    return ALLOCATIONS[name]
