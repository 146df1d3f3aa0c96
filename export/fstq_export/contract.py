"""The quality contract's arithmetic: what was lost, how sure that is, and what a setting costs. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.items import Item

HELD_OUT, FEWEST = 300, 24
EXACT_ABOVE = 0.2  # dense exact match from which on exact match is the measure of quality

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Quality over the held-out items: per item exact match (0 or 1) and negative log-likelihood (nats per token)."""

    exact: Array
    nll: Array

    def values(self, metric: str) -> Array:
        """Per item exact match, or nll."""
        return self.exact if metric == "exact match" else self.nll

    @property
    def metric(self) -> str:
        """What to judge by, given that this is the dense model's outcome."""
        return "exact match" if self.exact.mean() >= EXACT_ABOVE else "nll"


def drop(dense: Outcome, pruned: Outcome, metric: str) -> float:
    """Lost quality relative to dense: of exact match, or as relative increase of nll."""
    a, b = dense.values(metric).mean(), pruned.values(metric).mean()
    return float((a - b if metric == "exact match" else b - a) / max(a, 1e-9))


def interval(dense: Outcome, pruned: Outcome, metric: str, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`drop` over the held-out items, pairs kept together."""
    count = len(dense.exact)
    rows = np.random.default_rng(seed).integers(0, count, (draws, count))
    lost = pruned.values(metric) - dense.values(metric)
    drops = (-lost if metric == "exact match" else lost)[rows].mean(1) / max(dense.values(metric).mean(), 1e-9)
    low, high = np.quantile(drops, (0.025, 0.975))
    return float(low), float(high)


def smallest_allowed(drops: Mapping[float, float], allowed: float) -> float | None:
    """The smallest keep ratio whose drop is allowed; None when there is none.

    Keeping more cannot truly cost more, so the measured drops are first made monotone (isotonic regression): a lucky
    small ratio is held back by its unlucky neighbours, and the other way round.
    """
    keeps = sorted(drops)
    smooth = isotonic_regression([drops[keep] for keep in keeps], increasing=False).x
    return next((keep for keep, lost in zip(keeps, smooth, strict=True) if lost <= allowed), None)


def candidate_layers(layers: int) -> list[int]:
    """Prune layers to try in a model of two layers or more: a quarter, a third and half of the way up."""
    return sorted({max(1, layers // part) for part in (4, 3, 2)})


def relative_cost(layer: int, layers: int, keep: float) -> float:
    """Prefill work relative to dense: all tokens below the prune layer, ``keep`` of them above."""
    return layer / layers + keep * (1 - layer / layers)


def split(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """(training, held-out): a fifth is held out, at most 300. Raises CalibrationDataError for too few items."""
    if len(items) < FEWEST:
        raise CalibrationDataError(
            f"found {len(items)} usable calibration items; at least {FEWEST} are needed, "
            "to train a probe and to measure it on others"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    held = min(HELD_OUT, max(FEWEST // 3, len(items) // 5))
    return [items[i] for i in order[held:]], [items[i] for i in order[:held]]
