"""How many coordinates of each tensor are sent, and with how many bits. Counts and codes out; bytes are counted later.

Rates are modelled (entropy of a Bernoulli support, bits of the code); compress.py compares with the bytes a message
really has and asks again with other ``bits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from fstq_infer.errors import OptionError
from fstq_infer.federated.plan import Allocation, Plan, Planner, Problem, support_bits
from fstq_infer.federated.quantize import quantizer
from fstq_infer.federated.select import Ints, top
from fstq_infer.federated.water import WaterFilling


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

    def planner(self, problem: Problem) -> Planner:
        return partial(_by_share, problem, (self.density,), (self.quantizer,))


@dataclass(frozen=True, slots=True)
class Everything:
    """All coordinates with one quantizer, or an error: for a codec that must not leave anything out."""

    quantizer: str = "fp32"

    def planner(self, problem: Problem) -> Planner:
        return partial(self._plan, problem)

    def _plan(self, problem: Problem, bits: float | None) -> Plan:
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

    shares: of all coordinates with each code, the best first; the defaults are ours. Under a budget all shrink alike.
    """

    shares: tuple[float, ...] = (0.005, 0.015, 0.03)
    quantizers: tuple[str, ...] = ("fp16", "uniform4", "uniform2")

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.quantizers) or min(self.shares, default=0) <= 0 or sum(self.shares) > 1:
            raise OptionError(
                f"shares {self.shares} for {self.quantizers}: expected one above 0 for each, and a sum of at most 1"
            )
        for name in self.quantizers:
            quantizer(name)

    def planner(self, problem: Problem) -> Planner:
        return partial(_by_share, problem, self.shares, self.quantizers)


def _by_share(problem: Problem, shares: tuple[float, ...], names: tuple[str, ...], bits: float | None) -> Plan:
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
    rest = top(problem.scores, ends[-1])
    chosen = list[Ints]()
    for count in np.diff(ends, prepend=0)[:-1].tolist():
        best = top(problem.scores[rest], count)
        chosen.append(rest[best])
        rest = np.delete(rest, best)
    chosen.append(rest)
    counts = np.stack([_counts_of(indices, problem.sizes) for indices in chosen])
    numbers = np.arange(1, len(names) + 1)[:, None]
    return Plan(counts, np.where(counts > 0, numbers, 0), dict(enumerate(names, 1)), chosen)


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
