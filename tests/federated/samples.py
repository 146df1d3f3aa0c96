"""Layers and messages for tests: supports drawn at random, values in any mix of codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fstq_infer.federated import quantize
from fstq_infer.federated.layer import Layer, starts_of, supports
from fstq_infer.federated.tensors import TensorManifest

BASE = bytes(range(16))


def entropy(histogram: Sequence[int] | NDArray[np.int64]) -> float:
    """Bits of all items of a histogram together, as independent draws."""
    counts = np.asarray(histogram, np.float64)
    seen = counts[counts > 0]
    return float((seen * np.log2(seen.sum() / seen)).sum())


def manifest(sizes: Sequence[int]) -> TensorManifest:
    return TensorManifest(tuple((f"t{number}", (int(size),)) for number, size in enumerate(sizes)))


def layer(
    rng: np.random.Generator, left: NDArray[np.int64], density: Sequence[float], names: Sequence[str]
) -> tuple[Layer, NDArray[np.int64], NDArray[np.float32]]:
    """(layer, its positions from the first tensor on, the values that went in); Bernoulli supports."""
    marks = [rng.random(size) < p for size, p in zip(left.tolist(), density, strict=True)]
    counts = np.array([int(mark.sum()) for mark in marks], np.int64)
    positions = np.concatenate([np.flatnonzero(mark) for mark in marks])
    values = (rng.standard_t(4, len(positions)) * 1e-3).astype(np.float32)
    numbers = dict(enumerate(names, 1))
    choice = np.where(counts > 0, rng.integers(1, len(names) + 1, len(counts)), 0)
    exponent, scales, codes, blocks = quantize.apply(values, counts, numbers, choice)
    found = Layer(codes, supports(positions, counts, left), counts, exponent, scales, positions, blocks)
    return found, positions + np.repeat(starts_of(left), counts), values
