"""Token scores: strategies that say which prompt tokens matter. Arrays in, scores out; selection is apart.

Each strategy is a frozen dataclass with one method; :data:`SCORES` names them. ``gate`` and ``embedding`` need labels
and gradients, so they serve as targets for the probe and as references; the others work at inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError
from fstq_infer.fisher.select import max_pool

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one prompt of S tokens at a prune layer.

    attention: (H, W, S) weights of the last W queries in the layer before the prune layer.
    gate, embedding: (S,) Fisher sensitivities, where gradients were taken. probe: (S,), where a probe was run.
    seed: for strategies that draw.
    """

    attention: Array
    gate: Array | None = None
    embedding: Array | None = None
    probe: Array | None = None
    seed: int = 0

    @property
    def tokens(self) -> int:
        """S."""
        return int(self.attention.shape[-1])


class Score(Protocol):
    """A strategy: evidence in, (S,) scores out, higher stays."""

    def __call__(self, evidence: Evidence) -> Array: ...


def _needed(array: Array | None, name: str) -> Array:
    if array is None:
        raise OptionError(f"the evidence holds no {name} scores; compute them first (fstq_infer.fisher)")
    return array


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform noise: what pruning costs when nothing is known."""

    def __call__(self, evidence: Evidence) -> Array:
        return np.random.default_rng(evidence.seed).random(evidence.tokens)


@dataclass(frozen=True, slots=True)
class Recency:
    """Latest tokens stay; with the forced first tokens this is StreamingLLM (Xiao et al., arXiv 2309.17453)."""

    def __call__(self, evidence: Evidence) -> Array:
        return np.arange(evidence.tokens, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class LastTokenAttention:
    """Attention of the last prompt token, mean over heads: FastV (Chen et al., arXiv 2403.06764)."""

    def __call__(self, evidence: Evidence) -> Array:
        scores: Array = evidence.attention[:, -1].mean(0)
        return scores


@dataclass(frozen=True, slots=True)
class WindowAttention:
    """Attention of the last W queries, mean over heads and queries, max-pooled: SnapKV (Li et al., 2404.14469)."""

    pool: int = 7

    def __call__(self, evidence: Evidence) -> Array:
        return max_pool(evidence.attention.mean((0, 1)), self.pool)


@dataclass(frozen=True, slots=True)
class Gate:
    """Fisher information of a presence gate on the token as a key, ``(dL/dlog m_i)^2``, square root, max-pooled."""

    pool: int = 7

    def __call__(self, evidence: Evidence) -> Array:
        return max_pool(np.sqrt(_needed(evidence.gate, "gate")), self.pool)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Fisher information of the token's input embedding, ``||dL/de_i||^2``: Fed-FSTQ (arXiv 2604.25421)."""

    pool: int = 7

    def __call__(self, evidence: Evidence) -> Array:
        return max_pool(np.sqrt(_needed(evidence.embedding, "embedding")), self.pool)


@dataclass(frozen=True, slots=True)
class Learned:
    """The calibrated probe's own scores (see :mod:`fstq_infer.fisher.probe`)."""

    def __call__(self, evidence: Evidence) -> Array:
        return _needed(evidence.probe, "probe")


SCORES: dict[str, Score] = {
    "random": Random(),
    "recency": Recency(),
    "last-token": LastTokenAttention(),
    "window": WindowAttention(),
    "gate": Gate(),
    "embedding": Embedding(),
    "probe": Learned(),
}
BASELINES = ("random", "recency", "last-token", "window")
TARGETS = ("gate", "embedding")
