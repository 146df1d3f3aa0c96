"""Calibration looked at again with an adapter: does the contract hold for it, and if not, does a probe of its own help?

The graph stays: an adapter's probe reads what the bundle's reads and has its shapes, so that only numbers differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fstq_export.calibrate import Calibration, Calibrator
from fstq_export.contract import Outcome, within
from fstq_export.heldout import HeldOut, Trial
from fstq_export.recipe import Recipe
from fstq_infer.bundle import Contract, Pruning
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.probe import Probe

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recheck:
    """pruning: what holds with the adapter. probes: its own, None where the bundle's serve. report: for report.json."""

    pruning: Pruning
    probes: tuple[Probe | None, ...] | None
    report: dict[str, Any]


def recheck(
    decoder: Decoder,
    calibration: Calibration,
    parts: tuple[Sequence[Item], Sequence[Item]],
    recipe: Recipe,
    name: str,
    progress: Progress,
    exact: Outcome | None = None,
) -> Recheck:
    """decoder: the model with the adapter in place. parts: training and held-out items, as in the bundle's calibration.

    exact: of the held-out items with the adapter before the model's weights got formats, if they have some.
    """
    training, items = parts
    fixed = replace(recipe, prune_layer=list(calibration.layers), window=calibration.window)
    run = Calibrator(decoder, parts, fixed, lambda step, done, total: progress(f"{name}: {step}", done, total), exact)
    layers, first_layer = calibration.layers, calibration.layers[:1]
    observed = run._observe(items, "observe held-out items", first_layer, published=True)
    whole = Outcome(np.array([float(o.exact) for o in observed]), np.array([o.nll for o in observed]))
    dense = exact or whole
    held = HeldOut(decoder, items, dense, whole, fixed, calibration.window)
    keeps, pruned = calibration.keeps, calibration.keeps[-1] < 1
    bundle = _trials(run, observed, calibration)
    lost, possible = _lost(held, bundle, keeps)
    met = within(lost, possible, recipe.max_quality_drop)
    auto = calibration.auto
    if auto is not None and not within(*held.sure(held.measure_mass(bundle, auto.mass)[0]), recipe.max_quality_drop):
        auto, met = None, met and pruned
    report: dict[str, Any] = {
        "metric": dense.metric,
        "dense": {"exact": float(dense.exact.mean()), "nll": float(dense.nll.mean())},
        "bundle_probe": {"keeps": keeps, "drop": lost, "bound": possible, "met": met},
        "own_probe": None,
        "max_quality_drop": recipe.max_quality_drop,
    }
    probes: tuple[Probe | None, ...] | None = None
    if not met and len(layers) == 1:
        seen = run._observe(training, "observe training items", first_layer)
        span = bundle.span

        def trial(kind: str, layer: int, score: str, probe: Probe) -> Trial:
            own = probe.with_span(span)  # the graph sums over as many tokens as the bundle's probe does
            return Trial(kind, layer, score, own, run._evidence(observed, layer, own))

        own = min((trial(*found) for found in run._distilled(first_layer, seen, "distil probes")), key=held.rating)
        if own.score == "gate":
            own = min((own, trial("tuned", own.layer, "gate", run._tuned(own, seen, ()))), key=held.rating)
        keeps, met = run._choose_keep(own, held)
        auto = run._adaptive(own, held)[0]
        lost, possible = _lost(held, own, keeps)
        probes = (own.probe,)
        report["own_probe"] = {"keeps": keeps, "drop": lost, "bound": possible, "met": met, "probe": own.name}
        _log.warning(
            "adapter %s breaks the quality contract with the bundle's probe; it gets its own, which %s",
            name,
            f"meets it at keep {keeps[-1]:g}" if met and keeps[-1] < 1 else "does not meet it either: it runs dense",
        )
    elif not met:
        _log.warning("adapter %s breaks the quality contract: it runs dense unless a keep ratio is named", name)
    if not met and recipe.keep is None:
        keeps = (1.0,) * len(layers)
    contract = Contract(met, dense.metric, recipe.max_quality_drop, lost)
    keep: float | tuple[float, ...] = keeps if len(keeps) > 1 else keeps[0]
    report |= {"met": met, "keeps": keeps, "auto": None if auto is None else asdict(auto)}
    return Recheck(Pruning(keep, calibration.score, True, contract, auto), probes, report)


def _lost(held: HeldOut, trial: Trial, keeps: tuple[float, ...]) -> tuple[float, float]:
    """What keep ratios lose, and possibly lose; where no token is dropped, what formats do."""
    if keeps[-1] < 1:
        return held.sure(held.measure(trial, keeps))
    return (0.0, 0.0) if held.whole is held.dense else held.sure(held.whole)


def _trials(run: Calibrator, observed: Sequence[Any], calibration: Calibration) -> Trial:
    """The bundle's own stages over what was observed with the adapter."""
    best: Trial | None = None
    for layer, probe in zip(calibration.layers, calibration.probes, strict=True):
        if best is None:
            if probe is None:
                raise ValueError("the first stage has no probe")
            best = Trial("bundle", layer, calibration.score, probe, run._evidence(observed, layer, probe))
        elif probe is None:
            best = Trial("carried", layer, best.score, best.probe, best.evidence, best.stages)
        else:
            best = Trial("bundle", layer, calibration.score, probe, best.evidence, best.stages)
    if best is None:
        raise ValueError("there are no stages")
    return best
