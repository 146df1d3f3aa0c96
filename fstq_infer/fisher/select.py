"""From scores to kept tokens: pure functions on numpy arrays. The exported graph does the same with TopK."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def keep_count(tokens: int, ratio: float, sink: int, window: int) -> int:
    """How many of ``tokens`` stay at a keep ratio; never fewer than the forced ones, never more than there are."""
    # 0.07 * 100 is a little more than 7 in floating point; that must not keep an eighth token.
    return min(tokens, max(sink + window, math.ceil(ratio * tokens - 1e-9), 1))


def mass_count(scores: NDArray[np.floating], mass: float, sink: int, window: int, scale: float = 1.0) -> int:
    """How many tokens stay so that they hold the share ``mass`` of what the scores say matters.

    The forced ones, and as few of the others as reach ``mass`` of their softmax(score / scale). scores: (S,).
    """
    free = scores[sink : max(sink, len(scores) - window)].astype(np.float32)
    if not len(free):
        return len(scores)
    weights = np.sort(np.exp((free - free.max()) / np.float32(scale)))[::-1]
    before = np.append(np.float32(0), np.cumsum(weights)[:-1])
    return len(scores) - len(free) + int((before < np.float32(mass) * weights.sum()).sum())


def select(scores: NDArray[np.floating], keep: int, sink: int, window: int) -> NDArray[np.int64]:
    """Indices (keep,) that stay, ascending: first ``sink``, last ``window``, then the highest scores; ties to the left.

    scores: (S,) of one prompt, higher stays.
    """
    column = np.arange(len(scores))
    free = (column >= sink) & (column < len(scores) - window)
    order = np.lexsort((-scores.astype(np.float64), free))  # forced ones first, whatever the scores; stable
    return np.sort(order[:keep]).astype(np.int64)


def max_pool(scores: NDArray[np.floating], width: int = 7) -> NDArray[np.floating]:
    """(S,) -> (S,): the largest score within ``width`` positions; words span several tokens, so neighbours matter."""
    half = width // 2
    padded = np.pad(scores, (half, width - 1 - half), constant_values=-np.inf)
    pooled: NDArray[np.floating] = np.lib.stride_tricks.sliding_window_view(padded, width).max(-1)
    return pooled
