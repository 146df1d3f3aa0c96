"""From logits to the next token: repetition penalty, temperature, top-k, top-p. Knows arrays, no engine and no text.

The kept tokens are those of Hugging Face's logits processors and warpers, applied in the same order.
"""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import neg
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import EngineError, OptionError

BLOCK = 512
FEW = 256  # up to so many candidates, Python's numbers take less time than NumPy's calls, whose code fell out of caches

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; ``temperature=0`` takes the most likely one and ignores top-k, top-p and the seed.

    temperature: >= 0. top_k: >= 0, 0 = all. top_p: 0 < p <= 1, 1 = all. repetition_penalty: > 0, 1 = none (CTRL,
    arXiv 1909.05858). seed: >= 0, or None for a different text each time. Raises OptionError for anything else.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _is_real(self.temperature) and self.temperature >= 0, "a number >= 0")
        _check("top_k", self.top_k, _is_count(self.top_k), "a whole number >= 0 (0 keeps all tokens)")
        _check("top_p", self.top_p, _is_real(self.top_p) and 0 < self.top_p <= 1, "a number with 0 < top_p <= 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _is_real(penalty) and penalty > 0, "a number > 0 (1 changes nothing)")
        _check("seed", self.seed, self.seed is None or _is_count(self.seed), "a whole number >= 0, or None")


class Sampler:
    """Draws the tokens of one text. Holds that text's random numbers and the set of tokens seen so far."""

    __slots__ = ("_array", "_distinct", "_factor", "_filled", "_read", "_seen", "_uniform", "sampling")

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._factor = float(np.float32(sampling.repetition_penalty))
        self._uniform = _uniform(sampling.seed) if sampling.temperature > 0 else None
        self._seen: set[int] = set()
        self._distinct: list[int] = []  # the set again, in the order of the text
        self._array: Ints = np.empty(256, np.int64)  # and again, its first _filled entries
        self._filled = 0
        self._read = 0

    def __call__(self, logits: Floats, history: Sequence[int], largest: tuple[Ints, Floats] | None = None) -> int:
        """The next token id. logits: (vocab,), left as they are. history: prompt and generated ids so far.

        largest: ids and values of the largest logits, where somebody has picked them already: the largest first, of
            equal ones that of the lower id.

        ``history`` must be the same growing sequence at every call: only what was added since the last one is read.
        Raises EngineError when the logits hold NaN or have no finite maximum.
        """
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            self._see(history, len(logits))
        greedy = self._uniform is None
        uniform = 0.0 if self._uniform is None else next(self._uniform)
        k = 1 if greedy else self.sampling.top_k
        if penalty >= 1 and logits.itemsize == 4 and not (greedy and penalty == 1):  # NumPy finds a maximum sooner
            token = None
            if largest is not None and 0 < k < len(largest[0]):
                values: list[float] = largest[1].tolist()
                # Logits that were not picked may equal the smallest that was; where it is NaN, nothing reaches it.
                token = self._among_few(largest[0], values, math.nextafter(values[-1], math.inf), k, uniform)
            elif not greedy and 0 < k < len(logits):
                ids, top, bound = shortlist(logits, k if penalty == 1 else min(2 * k, len(logits)))
                if len(ids) <= FEW:
                    order = (-top).argsort(kind="stable")
                    token = self._among_few(ids[order], top[order].tolist(), bound, k, uniform)
            if token is not None:
                return token
        return self._over_all(logits, uniform)

    def _among_few(self, ids: Ints, values: list[float], bound: float, k: int, uniform: float) -> int | None:
        """The token, drawn from the values of all float32 logits that reach a bound.

        The largest is first, of equal ones that of the lower id. None where drawing from all would not be the same.
        """
        ranked = values
        if self._factor != 1:
            factor, seen = self._factor, self._seen
            hits = [place for place, token in enumerate(ids.tolist()) if token in seen]
            # Rounded to float32 as its own arithmetic rounds.
            lowered = array("f", [values[i] * factor if values[i] < 0 else values[i] / factor for i in hits])
            for place, value in zip(hits, lowered, strict=True):
                values[place] = value
            ranked = sorted(values, reverse=True)
        least = ranked[k - 1]
        # A penalty above 1 raises nothing: while k logits reach the bound, no other can pass.
        if not least >= bound:  # as NaN does not
            return None
        kept = ranked[: bisect.bisect_right(ranked, -least, key=neg)]
        if self._uniform is None:
            value = kept[0]
        else:
            sampling, peak, exp, places = self.sampling, kept[0], math.exp, None
            temperature = sampling.temperature
            if sampling.top_p == 1:  # drawn in the order of ids
                places = [place for place, value in enumerate(values) if value >= least]
                places.sort(key=ids.tolist().__getitem__)
                kept = [values[place] for place in places]
            running = list(itertools.accumulate([exp((value - peak) / temperature) for value in kept]))
            if sampling.top_p < 1:
                del running[bisect.bisect_left(running, sampling.top_p * running[-1]) + 1 :]
            drawn = _draw_running(running, uniform)
            if places is not None:
                return int(ids.item(places[drawn]))
            if ranked is values or values == ranked:
                return int(ids.item(drawn))
            value = kept[drawn]
        if kept.count(value) > 1:  # which of them has the lower id is no longer known
            return None
        return int(ids.item(values.index(value)))

    def _over_all(self, logits: Floats, uniform: float) -> int:
        if self.sampling.repetition_penalty == 1:
            return self._choose(logits, uniform)
        if not logits.flags.writeable:
            logits = logits.copy()
        ids = self._seen_ids()
        seen = logits.take(ids)
        logits[ids] = penalized(seen, self.sampling.repetition_penalty)  # a copy of all logits would take longer
        try:
            return self._choose(logits, uniform)
        finally:
            logits[ids] = seen

    def _choose(self, logits: Floats, uniform: float) -> int:
        if self._uniform is None:
            best = int(logits.argmax())  # NaN counts as the largest value, so one look finds any
            _check_finite(logits.item(best))
            return best
        ids, weights = candidates(logits, self.sampling)
        place = _draw(weights, uniform)
        return place if ids is None else int(ids[place])

    def _see(self, history: Sequence[int], vocab: int) -> None:
        """Read what was added to ``history``; ids that the engine has no logit for are left out."""
        for token in history[self._read :]:
            if token < vocab and token not in self._seen:
                self._seen.add(token)
                self._distinct.append(token)
        self._read = len(history)

    def _seen_ids(self) -> Ints:
        """The distinct ids seen so far."""
        end = len(self._distinct)
        if end > len(self._array):
            grown = np.empty(2 * end, np.int64)
            grown[: self._filled] = self._array[: self._filled]
            self._array = grown
        for place in range(self._filled, end):
            self._array[place] = self._distinct[place]
        self._filled = end
        return self._array[:end]


def _uniform(seed: int | None) -> Iterator[float]:
    """Random numbers from 0 to 1, the same as one by one, made in advance: NumPy's way to a single one is long."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.random(64).tolist()


def penalized(logits: Floats, penalty: float) -> Floats:
    """Logits of seen tokens, made less likely (more likely for a penalty below 1)."""
    choose = np.minimum if penalty > 1 else np.maximum
    chosen: Floats = choose(logits * penalty, logits / penalty)  # the product where negative, else the quotient
    return chosen


def candidates(logits: Floats, sampling: Sampling) -> tuple[Ints | None, Floats]:
    """The ids that may be drawn (None = all, in order) and their weights (not normalised). Needs temperature > 0."""
    if 0 < sampling.top_k < len(logits):
        ids = top_ids(logits, sampling.top_k)
        top = logits[ids].astype(np.float64)
        weights = np.exp((top - top.max()) / sampling.temperature)
        return _nucleus(ids, weights, sampling.top_p * weights.sum()) if sampling.top_p < 1 else (ids, weights)
    peak = logits.max()
    _check_finite(peak)
    weights = np.exp((logits - peak) / logits.dtype.type(max(sampling.temperature, 1e-30)))
    if sampling.top_p == 1:
        return None, weights
    mass = sampling.top_p * weights.sum(dtype=np.float64)
    reach = 64
    while reach < len(logits) // 4:  # the nucleus is most often small: look for it among a few tokens first
        ids = top_ids(logits, reach)
        if weights[ids].sum(dtype=np.float64) >= mass:
            return _nucleus(ids, weights[ids].astype(np.float64), mass)
        reach *= 8
    return _nucleus(np.arange(len(logits)), weights.astype(np.float64), mass)


def top_ids(logits: Floats, k: int) -> Ints:
    """Ascending ids of the ``k`` largest logits, and of those equal to the smallest of them. 0 < k <= len(logits).

    Raises EngineError when the logits hold NaN or have no finite maximum.
    """
    ids, top, _ = shortlist(logits, k)
    found: Ints = ids[top >= _kth(top, k)]
    return found


def shortlist(logits: Floats, k: int) -> tuple[Ints, Floats, float]:
    """Ids of at least ``k`` logits, ascending, their values, and the bound that all of them and no others reach.

    Raises EngineError when the logits hold NaN or have no finite maximum.
    """
    count = 3 * k
    size = len(logits) // count
    if size < 64:
        _check_finite(logits.max())
        bound = _kth(logits, k)
    else:  # k of these blocks' maxima reach the k-th largest of them, so the k largest logits do, and few others
        end = count * size
        best = logits[:end].reshape(count, size).argmax(axis=1)  # NaN counts as the largest value
        maxima = logits.take(best + np.arange(0, end, size))
        maxima.sort()
        bound, peak = maxima[-k], maxima.item(-1)
        if end < len(logits):
            rest = logits[end:]
            other = rest.item(rest.argmax())
            if other > peak or math.isnan(other):
                peak = other
        _check_finite(peak)
    ids: Ints = (logits >= bound).nonzero()[0]
    return ids, logits.take(ids), float(bound)


def _kth(values: Floats, k: int) -> Any:
    """The ``k``-th largest."""
    ranked = values.copy()
    ranked.partition(len(values) - k)
    return ranked[len(values) - k]


def _check_finite(peak: float | np.floating[Any]) -> None:
    if not math.isfinite(peak):
        raise EngineError(
            f"the engine returned {peak} as its largest logit, which no token can be drawn from. The "
            "weights or activations overflowed; build the engine again with a wider format (float32 or bfloat16)"
        )


def _nucleus(ids: Ints, weights: Floats, mass: float) -> tuple[Ints, Floats]:
    """The smallest set of the heaviest ids whose weights reach ``mass``; at least one."""
    order = np.argsort(-weights, kind="stable")
    weights = weights[order]
    size = int(np.searchsorted(np.cumsum(weights), mass)) + 1
    return ids[order[:size]], weights[:size]


def _draw(weights: Floats, uniform: float) -> int:
    """The index at the share ``uniform`` (0 <= u < 1) of the weights' sum; never one of weight zero."""
    starts = np.arange(0, len(weights), BLOCK)  # sums of blocks first: a running sum over a whole vocabulary is slow
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    block = _first_above(blocks, target)
    begin = block * BLOCK
    inside = np.cumsum(weights[begin : begin + BLOCK], dtype=np.float64)
    return begin + _first_above(inside, target - (blocks[block - 1] if block else 0.0))


def _draw_running(running: list[float], uniform: float) -> int:
    """:func:`_draw` for few weights, given as their running sum."""
    return min(bisect.bisect_right(running, uniform * running[-1]), bisect.bisect_left(running, running[-1]))


def _first_above(running: Floats, target: float) -> int:
    """First index whose running sum exceeds the target, or where the sum reaches its end, if rounding hides the one."""
    return int(min(np.searchsorted(running, target, side="right"), np.searchsorted(running, running[-1])))


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise OptionError(f"{name}={value!r} is not accepted; expected {expected}")
