"""Token scores: strategies that say which prompt tokens matter. Arrays in, scores out; selection is apart.

Each strategy is a frozen dataclass with one method; :data:`SCORES` names them. ``gate`` and ``embedding`` need labels
and gradients, so they serve as targets for the probe and as references; the others need a forward pass at most. The
published ones were made to drop keys and values once a layer has computed them: ``snapkv``, ``key-norm`` and
``expected-attention`` read the prune layer itself, which a graph that drops tokens before that layer cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError
from fstq_infer.fisher.select import max_pool

Array = NDArray[np.floating]
SINKS = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one prompt of S tokens at a prune layer.

    attention: (H, W, S) weights of the last W queries in the layer before the prune layer.
    gate, embedding: (S,) Fisher sensitivities, where gradients were taken. probe: (S,), where a probe was run.
    own: (S,) attention of the last W queries in the prune layer itself, mean over heads and queries. key_norm: (S,)
    norm of its keys, mean over heads. expected: (S,) as :func:`expected_attention` gives. surprise: (S,) negative
    log-likelihood of each token, in nats; that of the first is not read. seed: for strategies that draw.
    """

    attention: Array
    gate: Array | None = None
    embedding: Array | None = None
    probe: Array | None = None
    own: Array | None = None
    key_norm: Array | None = None
    expected: Array | None = None
    surprise: Array | None = None
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
        raise OptionError(f"the evidence holds no '{name}'; compute it first (fstq_infer.fisher)")
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
    """Attention of the last token in the layer before, mean over heads: FastV (Chen et al., arXiv 2403.06764)."""

    def __call__(self, evidence: Evidence) -> Array:
        scores: Array = evidence.attention[:, -1].mean(0)
        return scores


@dataclass(frozen=True, slots=True)
class WindowAttention:
    """SnapKV's signal one layer earlier, in the layer before the prune layer: what an engine has when it prunes."""

    pool: int = 7

    def __call__(self, evidence: Evidence) -> Array:
        return max_pool(evidence.attention.mean((0, 1)), self.pool)


@dataclass(frozen=True, slots=True)
class SnapKV:
    """The prune layer's attention of the last W queries, mean over heads and queries, max-pooled.

    SnapKV (Li et al., arXiv 2404.14469), with one selection for all heads and for all layers above.
    """

    pool: int = 7

    def __call__(self, evidence: Evidence) -> Array:
        return max_pool(_needed(evidence.own, "own"), self.pool)


@dataclass(frozen=True, slots=True)
class KeyNorm:
    """Minus the L2 norm of the prune layer's keys: low ones draw attention (Devoto et al., arXiv 2406.11430)."""

    def __call__(self, evidence: Evidence) -> Array:
        return -_needed(evidence.key_norm, "key_norm")


def expected_attention(queries: Array, keys: Array, values: Array, scale: float) -> Array:
    """(S,) attention that keys can expect of future queries, times the norm of their values, mean over heads.

    queries: (H, S, D) of the prompt, rotated by the average of the rotations of future positions. keys: (G, S, D) and
    values (G, S, D'), as in the cache. scale: of the attention logits.
    The queries' mean and covariance make a Gaussian, of which ``E[exp(scale q.k)]`` has a closed form; it is normalised
    over the keys. As in the authors' kvpress, the first tokens are left out as attention sinks, and stay.
    """
    scores = np.zeros(keys.shape[1])
    if len(scores) <= SINKS:
        return scores
    q, k, v = (array[:, SINKS:].astype(np.float64) for array in (queries, keys, values))
    k, v = (np.repeat(array, len(q) // len(keys), axis=0) for array in (k, v))
    mean = q.mean(1, keepdims=True)
    covariance = (q - mean).swapaxes(1, 2) @ (q - mean) / q.shape[1]
    logits = scale * (k * mean).sum(-1) + scale**2 / 2 * (k @ covariance * k).sum(-1)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    scores[SINKS:] = (weights * np.linalg.norm(v, axis=-1)).mean(0)
    scores[:SINKS] = scores.max()
    return scores


@dataclass(frozen=True, slots=True)
class ExpectedAttention:
    """:func:`expected_attention` in the prune layer: Expected Attention (Devoto et al., arXiv 2510.00636)."""

    def __call__(self, evidence: Evidence) -> Array:
        return _needed(evidence.expected, "expected")


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Tokens that surprise the model stay, and the first, which nothing predicts; whatever is asked of the prompt.

    The token level of LLMLingua (Jiang et al., arXiv 2310.05736), with the model itself in place of a small one.
    """

    def __call__(self, evidence: Evidence) -> Array:
        scores = _needed(evidence.surprise, "surprise").copy()
        scores[0] = scores[1:].max(initial=0)
        return scores


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
    "snapkv": SnapKV(),
    "key-norm": KeyNorm(),
    "expected-attention": ExpectedAttention(),
    "perplexity": Perplexity(),
    "gate": Gate(),
    "embedding": Embedding(),
    "probe": Learned(),
}
BASELINES = (
    "random",
    "recency",
    "last-token",
    "window",
    "snapkv",
    "key-norm",
    "expected-attention",
    "perplexity",
)
TARGETS = ("gate", "embedding")


def computable(names: Iterable[str], evidence: Evidence) -> list[str]:
    """Those of ``names`` that the evidence suffices for: not every architecture gives all of it."""
    found = []
    for name in names:
        try:
            SCORES[name](evidence)
        except OptionError:
            continue
        found.append(name)
    return found
