"""From logits to the next token: repetition penalty, temperature, top-k, top-p. Knows arrays, no engine and no text.

The kept tokens are those of Hugging Face's logits processors and warpers, applied in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import EngineError, OptionError

BLOCK = 512

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
    """Draws the tokens of one text. Holds that text's random generator and the set of tokens seen so far."""

    __slots__ = ("_count", "_ids", "_read", "_rng", "_seen", "sampling")

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._rng = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None
        self._seen: set[int] = set()
        self._ids: Ints = np.empty(256, np.int64)  # the set again, as an array; its first _count entries
        self._count = 0
        self._read = 0

    def __call__(self, logits: Floats, history: Sequence[int]) -> int:
        """The next token id. logits: (vocab,), left as they are. history: prompt and generated ids so far.

        ``history`` must be the same growing sequence at every call: only what was added since the last one is read.
        Raises EngineError when the logits hold NaN or have no finite maximum.
        """
        if self.sampling.repetition_penalty == 1.0:
            return self._choose(logits)
        if not logits.flags.writeable:
            logits = logits.copy()
        ids = self._seen_ids(history, len(logits))
        seen = logits[ids]
        logits[ids] = penalized(seen, self.sampling.repetition_penalty)  # a copy of all logits would take longer
        try:
            return self._choose(logits)
        finally:
            logits[ids] = seen

    def _choose(self, logits: Floats) -> int:
        if self._rng is None:
            best = int(np.argmax(logits))  # NaN counts as the largest value, so one look finds any
            _check_finite(logits[best])
            return best
        ids, weights = candidates(logits, self.sampling)
        place = _draw(weights, self._rng.random())
        return int(ids[place]) if ids is not None else place

    def _seen_ids(self, history: Sequence[int], vocab: int) -> Ints:
        """The distinct ids in ``history`` so far, those that the engine has no logit for left out."""
        fresh = {token for token in history[self._read :] if token < vocab} - self._seen
        self._read = len(history)
        if fresh:
            self._seen |= fresh
            end = self._count + len(fresh)
            if end > len(self._ids):
                grown = np.empty(2 * end, np.int64)
                grown[: self._count] = self._ids[: self._count]
                self._ids = grown
            self._ids[self._count : end] = list(fresh)
            self._count = end
        return self._ids[: self._count]


def penalized(logits: Floats, penalty: float) -> Floats:
    """Logits of seen tokens, made less likely (more likely for a penalty below 1)."""
    factor = logits.dtype.type(penalty)
    return np.where(logits < 0, logits * factor, logits / factor)


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
    width = 16 * k
    if width * 4 > len(logits):
        _check_finite(logits.max())
        return np.flatnonzero(logits >= np.partition(logits, len(logits) - k)[len(logits) - k])
    # k of these column maxima are at least the k-th largest of them, so what is smaller is not among the top k, nor
    # is anything else in its column: one pass over the logits leaves few columns to select from.
    rows = len(logits) // width
    table, rest = logits[: rows * width].reshape(rows, width), logits[rows * width :]
    maxima = table.max(axis=0)
    _check_finite(np.maximum(maxima.max(), rest.max(initial=-np.inf)))
    columns = np.flatnonzero(maxima >= np.partition(maxima, width - k)[width - k])
    inside = (columns + width * np.arange(rows)[:, None]).ravel()
    ids = np.append(inside, np.arange(rows * width, len(logits)))
    top = logits[ids]
    found: Ints = ids[top >= np.partition(top, len(top) - k)[len(top) - k]]
    return found


def _check_finite(peak: np.floating[Any]) -> None:
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
