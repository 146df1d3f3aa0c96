"""Which coordinates of an update matter: scores, and the best of them per tensor. Arrays in, indices out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
SAMPLE = 4096


class Selector(Protocol):
    """(N,) update and (N,) Fisher weights with mean 1, or None -> (N,) scores >= 0; higher is sent first."""

    def __call__(self, update: Floats, fisher: Floats | None, seed: int) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Fisher:
    """(F + damping) u^2: the second-order loss of leaving a coordinate out.

    damping: share of the mean Fisher added to all, so that a coordinate with none is not left out for ever.
    """

    damping: float = 0.1

    def __call__(self, update: Floats, fisher: Floats | None, seed: int) -> Floats:
        scores = np.square(update)
        if fisher is not None:
            scores *= fisher + np.float32(self.damping)
        return scores


@dataclass(frozen=True, slots=True)
class Magnitude:
    """u^2, which ranks as |u| does."""

    def __call__(self, update: Floats, fisher: Floats | None, seed: int) -> Floats:
        return np.square(update)


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform noise, another one for each seed: what sparsity costs when nothing is known."""

    def __call__(self, update: Floats, fisher: Floats | None, seed: int) -> Floats:
        return np.random.default_rng(seed).random(len(update), np.float32)


SELECTORS: Mapping[str, Selector] = {
    "fisher": Fisher(),
    "magnitude": Magnitude(),
    "random": Random(),
    "paper": Fisher(damping=0.0),  # Fed-FSTQ, arXiv 2604.25421: F d^2
}


def selector(name: str) -> Selector:
    """A row by name. Raises OptionError with the names there are."""
    if name not in SELECTORS:
        raise OptionError(f"there is no selector {name!a}; choose one of {', '.join(SELECTORS)}")
    return SELECTORS[name]


def top(scores: Floats, count: int) -> Ints:
    """(count,) indices of the highest scores, ascending; ties go to the left. scores: (N,), N >= count."""
    if count <= 0:
        return np.empty(0, np.int64)
    if count >= len(scores):
        return np.arange(len(scores))
    low, high = _bracket(scores, count)
    candidates = np.flatnonzero(scores >= low)
    found = scores[candidates]
    band = found[found <= high]
    needed = count - (len(found) - len(band))
    if len(found) < count or needed <= 0:  # the sample misled: look at all
        candidates, found, band, needed = np.arange(len(scores)), scores, scores, count
    least = np.partition(band, len(band) - needed)[len(band) - needed]
    kept = np.flatnonzero(found >= least)
    if len(kept) > count:
        ties = np.flatnonzero(found[kept] == least)
        kept = np.delete(kept, ties[len(ties) - (len(kept) - count) :])
    return candidates[kept]


def _bracket(scores: Floats, count: int) -> tuple[np.float32, np.float32]:
    """Two scores between which the count-th highest almost surely lies; sorting out what is between is fast."""
    step = len(scores) // SAMPLE
    if step < 4:
        return np.float32(-np.inf), np.float32(np.inf)
    sample = np.sort(scores[::step])
    rank = count * len(sample) / len(scores)
    margin = 4 * np.sqrt(rank * (1 - count / len(scores))) + 3
    low, high = len(sample) - int(rank + margin) - 1, len(sample) - int(rank - margin) - 1
    return sample[max(low, 0)], sample[high] if high < len(sample) else np.float32(np.inf)


def per_tensor(scores: Floats, sizes: Ints, counts: Ints) -> list[Ints]:
    """The best coordinates of each tensor as layers of the update.

    scores: (N,). sizes: (T,). counts: (L, T): layer 0 takes the best, layer 1 the best of the rest, and so on.
    Returns for each layer the indices into the N coordinates, ascending.
    """
    found: list[list[Ints]] = [[] for _ in counts]
    start = 0
    for t, size in enumerate(sizes.tolist()):
        wanted = np.cumsum(counts[:, t]).tolist()
        if wanted[-1]:
            mine = scores[start : start + size]
            chosen = top(mine, wanted[-1])
            for number in range(len(wanted) - 1):
                best = top(mine[chosen], wanted[number] - (wanted[number - 1] if number else 0))
                found[number].append(chosen[best] + start)
                chosen = np.delete(chosen, best)
            found[-1].append(chosen + start)
        start += size
    return [np.concatenate([np.empty(0, np.int64), *parts]) for parts in found]
