"""The quality contract's arithmetic: what was lost, how sure that is, and what a setting costs. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import beta

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.items import Item

HELD_OUT, FEWEST = 600, 24
SLACK = 1.5  # a claim of at most 1 % lost stands for: with 95 % confidence not more than 1.5 %
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


def interval(dense: Outcome, pruned: Outcome, metric: str, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`drop` over the held-out items, pairs kept together."""
    low, high = _bootstrap(dense, pruned, metric, seed, (0.025, 0.975))
    return low, high


def _bootstrap(
    dense: Outcome, pruned: Outcome, metric: str, seed: int, quantiles: Sequence[float], draws: int = 2000
) -> list[float]:
    count = len(dense.exact)
    rows = np.random.default_rng(seed).integers(0, count, (draws, count))
    lost = pruned.values(metric) - dense.values(metric)
    drops = (-lost if metric == "exact match" else lost)[rows].mean(1) / max(dense.values(metric).mean(), 1e-9)
    return [float(q) for q in np.quantile(drops, quantiles)]


def bound(dense: Outcome, pruned: Outcome, metric: str, seed: int) -> float:
    """The largest :func:`drop` that the held-out items leave possible, one-sided, with 95 % confidence.

    Of exact match: the Clopper-Pearson bound on the share of answers lost, less the share gained. Resampling would
    show no loss at all where none was seen, however few the items.
    """
    if metric != "exact match":
        return _bootstrap(dense, pruned, metric, seed, (0.95,))[0]
    change = pruned.exact - dense.exact
    count, lost, gained = len(change), int((change < 0).sum()), int((change > 0).sum())
    highest = float(beta.ppf(0.95, lost + 1, count - lost)) if lost < count else 1.0
    return (highest - gained / count) / max(float(dense.exact.mean()), 1e-9)


def within(lost: float, possible: float, allowed: float) -> bool:
    """Whether a measured drop and its :func:`bound` keep the contract."""
    return lost <= allowed and possible <= SLACK * allowed


def smallest_allowed(drops: Mapping[float, tuple[float, float]], allowed: float) -> float | None:
    """The smallest keep ratio that keeps the contract, of (drop, bound) by ratio; None when there is none.

    Keeping more cannot truly cost more, so both are first made monotone (isotonic regression): a lucky small ratio is
    held back by its unlucky neighbours, and the other way round.
    """
    keeps = sorted(drops)
    lost, possible = (isotonic_regression([drops[k][i] for k in keeps], increasing=False).x for i in (0, 1))
    good = (keep for keep, a, b in zip(keeps, lost, possible, strict=True) if within(a, b, allowed))
    return next(good, None)


def candidate_layers(layers: int) -> list[int]:
    """Prune layers to try in a model of two layers or more: a quarter, a third and half of the way up."""
    return sorted({max(1, layers // part) for part in (4, 3, 2)})


def relative_cost(layers: Sequence[int], total: int, keeps: Sequence[float]) -> float:
    """Prefill work relative to dense: all tokens below the first prune layer, ``keeps[n]`` from ``layers[n]`` on."""
    borders = zip(layers, (*layers[1:], total), keeps, strict=True)
    return (layers[0] + sum(keep * (end - start) for start, end, keep in borders)) / total


def split(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """(training, held-out): a quarter is held out, at most 600. Raises CalibrationDataError for too few items."""
    if len(items) < FEWEST:
        raise CalibrationDataError(
            f"found {len(items)} usable calibration items; at least {FEWEST} are needed, "
            "to train a probe and to measure it on others"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    held = min(HELD_OUT, max(FEWEST // 3, len(items) // 4))
    return [items[i] for i in order[held:]], [items[i] for i in order[:held]]
