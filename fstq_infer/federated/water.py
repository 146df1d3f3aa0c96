"""Reverse water-filling: which tensors get how many coordinates and bits under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError
from fstq_infer.federated.plan import Plan, Planner, Problem, support_bits
from fstq_infer.federated.quantize import quantizer
from fstq_infer.federated.select import Ints

Wide = NDArray[np.float64]
SCALE_BITS = 16
SAMPLES = 1024
STEPS, LEFT = 32, 0.005  # most greedy steps; share of the budget that may stay unspent
TABLE_SHARE = 0.05  # of the budget: a width whose table needs more is not used


@dataclass(frozen=True, slots=True)
class WaterFilling:
    """Density and bits of each tensor by reverse water-filling over {0, 1, 2, 3, 4, 8, 16} bits.

    Of all (density, bits) pairs a tensor takes the one that removes most weighted squared error minus the water level
    times its bits; the level is the one at which the message has the wanted size. That is where a greedy choice of the
    steepest steps along the tensors' convex hulls ends (Shoham and Gersho, 1988). Errors are estimated from a sample.
    """

    widths: tuple[int, ...] = (1, 2, 3, 4, 8, 16)

    def planner(self, problem: Problem) -> Planner:
        return partial(self._plan, *self._options(problem))

    def _plan(self, counts: Ints, gain: Wide, rate: Wide, bits: float | None) -> Plan:
        if bits is None:
            raise OptionError("water-filling divides a budget, but none was given. Pass budget=BYTES.")
        names = {width: "bf16" if width == 16 else f"lloyd{width}" for width in self.widths}
        tables = np.array([quantizer(name).code.table_bits for name in names.values()])
        affordable = tables <= TABLE_SHARE * bits
        best = _level(np.where(affordable, gain, -np.inf), rate, tables, bits)
        sent = np.where(best >= 0, counts[np.arange(len(best)), best // len(tables)], 0)
        width = np.where(sent > 0, np.array(self.widths)[best % len(tables)], 0)
        return Plan(sent[None], width[None], names)

    def _options(self, problem: Problem) -> tuple[Ints, Wide, Wide]:
        """(T, D) counts; (T, D, B) squared error removed and (T, D, B) bits."""
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
        return counts, gain, rate


def _level(gain: Wide, rate: Wide, tables: Ints, bits: float) -> Ints:
    """(T,) best of the D x B options of each tensor, -1 for none, at the lowest water level that ``bits`` allow.

    tables: (B,) bits that a message spends once on each width it uses.
    """
    tensors, widths = len(gain), len(tables)
    gain, rate, rows = gain.reshape(tensors, -1), rate.reshape(tensors, -1), np.arange(tensors)

    def choose(level: float) -> tuple[Ints, float]:
        worth = gain - level * rate
        best = np.argmax(worth, axis=1)
        best = np.where(worth[rows, best] > 0, best, -1)
        used = np.unique(best[best >= 0] % widths)
        return best, float(rate[rows, best][best >= 0].sum() + tables[used].sum())

    high = float((gain / rate).max()) * 2 + 1e-300
    low, best = high * 1e-15, choose(high)[0]
    for _ in range(60):
        level = float(np.sqrt(low * high))
        found, needed = choose(level)
        if needed <= bits:
            high, best = level, found
        else:
            low = level
    return _fill(gain, rate, best, tables, bits)


def _fill(gain: Wide, rate: Wide, best: Ints, tables: Ints, bits: float) -> Ints:
    """Spend what the level left: again and again the step with the most error removed per bit, among those that fit."""
    rows, sent = np.arange(len(best)), best >= 0
    has = np.where(sent, gain[rows, best], 0.0), np.where(sent, rate[rows, best], 0.0)
    used = np.isin(np.arange(len(tables)), best[sent] % len(tables))
    for _ in range(STEPS):
        left = bits - float(has[1].sum()) - float(tables[used].sum())
        if left < LEFT * bits:
            break
        more = rate - has[1][:, None] + np.tile(tables * ~used, rate.shape[1] // len(tables))
        worth = np.where((more > 0) & (more <= left), gain - has[0][:, None], 0.0) / np.maximum(more, 1e-9)
        tensor, option = np.unravel_index(int(np.argmax(worth)), worth.shape)
        if worth[tensor, option] <= 0:
            break
        best[tensor] = option
        has[0][tensor], has[1][tensor] = gain[tensor, option], rate[tensor, option]
        used[option % len(tables)] = True
    return best
