"""Calibration: which tokens matter, where to prune, how many to keep, and what it costs.

Items are split into training and held-out ones. On the training items the dense model is observed and probes are
distilled, one for each candidate layer and sensitivity. On the held-out items settings are measured, and the cheapest
one that keeps the allowed quality is chosen. A later stage is calibrated in the same way, on what earlier ones leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fstq_export.contract import (
    SLACK,
    Array,
    Outcome,
    bound,
    candidate_layers,
    interval,
    smallest_allowed,
    within,
)
from fstq_export.heldout import HeldOut, Trial, training_cuts
from fstq_export.recipe import Recipe
from fstq_infer.errors import OptionError
from fstq_infer.fisher import train
from fstq_infer.fisher import tune as tuning
from fstq_infer.fisher.gates import Observation, observe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Cut, Item
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.scores import BASELINES, SCORES, TARGETS, Evidence, computable
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import Auto, keep_ratios

KEEPS = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125)
CURVE = (0.5, 0.25, 0.125)
SHOWN = 0.25  # keep ratio of the example
MASSES = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the score mass that adaptive keep tries
SHORTEST = 0.01  # share of the calibration prompts that count as too short to prune adaptively
WINDOW = 4  # so many last tokens always stay; the rest of the question has to earn its place like any other token
EPOCHS, STEPS = 5, 400
SPAN, SPANS = 9, (1, 5, 13, 17)  # neighbours that a score is averaged over: at first, and what else is tried

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Calibration:
    """The result: the stages' prune layers and probes, the chosen keep ratios, and what was measured (for the report).

    probes: None where a stage goes on with the scores of the one before. score: the sensitivities that the probes were
    distilled from. keeps: of the prompt, after each stage. example: a held-out item, its tokens' scores before the
    first stage, and which stay after the last. window: so many last tokens always stay. auto: the share of the score
    mass that keeps the contract, if any.
    """

    layers: tuple[int, ...]
    probes: tuple[Probe | None, ...]
    score: str
    keeps: tuple[float, ...]
    drop: float
    metric: str
    met: bool
    example: tuple[Item, Array, frozenset[int]]
    window: int
    auto: Auto | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> float | tuple[float, ...]:
        """The keep ratios as the runtime takes them: a list only where there are several stages."""
        return self.keeps if len(self.keeps) > 1 else self.keeps[0]


class Calibrator:
    """One calibration run over a resident model.

    parts: training and held-out items, see :func:`fstq_export.contract.split`. exact: the held-out items' outcome
    before the model's weights got formats, if they have some: what the contract allows to be lost, formats and pruning
    may lose together.
    """

    def __init__(
        self,
        decoder: Decoder,
        parts: tuple[Sequence[Item], Sequence[Item]],
        recipe: Recipe,
        progress: Progress,
        exact: Outcome | None = None,
    ) -> None:
        self.decoder, self.recipe, self.progress, self.exact = decoder, recipe, progress, exact
        self.layers = len(decoder.layers)
        self.window = WINDOW if recipe.window is None else recipe.window
        if self.layers < 2:
            raise OptionError("this model has one decoder layer, nothing to prune before; export without --calib")
        recipe.check_layers(self.layers)
        self.candidates = list(recipe.layers[:1]) or candidate_layers(self.layers)
        self.training, self.held = parts
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)

    def run(self) -> Calibration:
        """The whole calibration."""
        seen = self._observe(self.training, "observe training items", self.candidates)
        observed = self._observe(self.held, "observe held-out items", self.candidates, published=True)
        whole = Outcome(np.array([float(o.exact) for o in observed]), np.array([o.nll for o in observed]))
        dense = self.exact or whole
        held = HeldOut(self.decoder, self.held, dense, whole, self.recipe, self.window)
        lossless = bound(dense, dense, dense.metric, self.recipe.seed)
        if lossless > SLACK * self.recipe.max_quality_drop and self.recipe.keep is None:
            _log.warning(
                "%d held-out items cannot bear out a drop within %g: even without one loss up to %.3g is possible, so "
                "no keep ratio will be claimed. Give more items (--calib, --calib-items) or allow a larger drop",
                len(self.held),
                self.recipe.max_quality_drop,
                lossless,
            )

        def first(kind: str, layer: int, score: str, probe: Probe) -> Trial:
            return Trial(kind, layer, score, probe, self._evidence(observed, layer, probe))

        best = self._stage(self.candidates, seen, first, held)
        for layer in self.recipe.layers[1:]:
            best = self._later(best, layer, held)
        keeps, met = self._choose_keep(best, held)
        return self._result(best, keeps, met, seen, held)

    def _observe(
        self,
        items: Sequence[Item],
        label: str,
        layers: Sequence[int],
        published: bool = False,
        cuts: Sequence[Cut] = (),
    ) -> list[Observation]:
        with self._timed("observe"):
            count = len(items)

            def report(done: int) -> None:
                self.progress(label, done, count)

            return observe(self.decoder, items, layers, progress=report, published=published, cuts=cuts)

    def _evidence(self, observed: Sequence[Observation], layer: int, probe: Probe) -> list[Evidence]:
        """Of the held-out items before the first stage."""
        evidence = []
        for index, o in enumerate(observed):
            with torch.no_grad():
                scores = probe(ProbeInput.pad([o.inputs[layer]]))[0].numpy()
            evidence.append(o.evidence(layer, scores, self.recipe.seed * 1_000_003 + index))
        return evidence

    def _later(self, best: Trial, layer: int, held: HeldOut) -> Trial:
        """One more stage: the best probe, trained on what the stages of ``best`` leave, or their scores carried on.

        They leave more of one training item and less of another, as they will at other keep ratios at run time.
        """
        all_stages = [Stage(at, self.recipe.sink, self.window) for at in self.recipe.layers]
        stages = all_stages[: len(best.stages)]
        final = [*CURVE, *([] if self.recipe.wanted is None else [self.recipe.wanted])]
        ratios = [keep_ratios(keep, all_stages)[: len(stages)] for keep in final]
        with self._timed("observe"):
            cuts = training_cuts(self.decoder, self.training, best, stages, ratios, self.recipe.seed)
        seen = self._observe(self.training, f"observe pruned items, stage {len(cuts) + 1}", [layer], cuts=cuts)

        def later(kind: str, layer: int, score: str, probe: Probe) -> Trial:
            return Trial(kind, layer, score, probe, best.evidence, best.stages)

        carried = Trial("carried", layer, best.score, best.probe, best.evidence, best.stages)
        return min((carried, self._stage([layer], seen, later, held, cuts)), key=held.rating)

    def _stage(
        self,
        layers: Sequence[int],
        seen: Sequence[Observation],
        trial: Callable[[str, int, str, Probe], Trial],
        held: HeldOut,
        cuts: Sequence[Cut] = (),
    ) -> Trial:
        """The best probe for one stage, before one of ``layers``. cuts: what earlier stages left of what was seen."""
        label = f"distil probes, stage {len(cuts) + 1}" if cuts else "distil probes"
        trials = [trial(*found) for found in self._distilled(layers, seen, label)]
        best = min(trials, key=held.rating)
        spans = [trial(best.kind, best.layer, best.score, best.probe.with_span(n)) for n in SPANS]
        best = min((best, *spans), key=held.rating)
        # Tuning lifts gate-distilled probes; those distilled from embedding scores lost by it at every setting.
        # Where the nll counts, it may lift the former above the latter.
        starts = [best] if held.dense.metric == "exact match" else [t for t in trials if t.layer == best.layer]
        start = next((t for t in starts if t.score == "gate"), None)
        if start is not None and held.rating(best) > held.best_rating(best):
            tuned = trial("tuned", start.layer, start.score, self._tuned(start, seen, cuts))
            best = min((best, tuned), key=held.rating)
        return best

    def _distilled(
        self, layers: Sequence[int], seen: Sequence[Observation], label: str
    ) -> Iterator[tuple[str, int, str, Probe]]:
        """(kind, layer, sensitivity, probe) for each candidate layer and sensitivity."""
        scores = TARGETS if self.recipe.score == "auto" else (self.recipe.score,)
        total = len(layers) * len(scores) * EPOCHS
        done = 0
        for layer in layers:
            for score in scores:
                torch.manual_seed(self.recipe.seed)
                width = seen[0].inputs[layer].states.shape[-1] // 2
                probe = Probe(width, seen[0].window[layer].shape[0], window=self.window)
                wanted = [o.gate[layer] if score == "gate" else o.embedding for o in seen]
                targets = [train.target(sensitivity.clone(), self.window) for sensitivity in wanted]
                inputs = [o.inputs[layer] for o in seen]

                def report(epoch: int, before: int = done) -> None:
                    self.progress(label, before + epoch, total)

                with self._timed("distil"):
                    train.distill(probe, inputs, targets, self.recipe.seed, EPOCHS, report)
                done += EPOCHS
                yield "distilled", layer, score, probe.with_span(SPAN)

    def _tuned(self, start: Trial, seen: Sequence[Observation], cuts: Sequence[Cut]) -> Probe:
        """A trial's probe, tuned through sampled gates; what a span was to do it learns itself."""
        probe = start.probe.with_span(1)
        label = f"tune probe, layer {start.layer}"
        with self._timed("tune"):
            tuning.tune(
                probe,
                self.decoder,
                start.layer,
                self.training,
                seen,
                self.recipe.sink,
                self.recipe.seed,
                STEPS,
                progress=lambda n: self.progress(label, n, STEPS),
                cuts=cuts,
            )
        return probe

    def _adaptive(self, trial: Trial, held: HeldOut) -> tuple[Auto | None, list[dict[str, Any]]]:
        """(adaptive keep that meets the contract with the fewest tokens, what each share of the mass gave)."""
        rows, costs = [], {}
        for number, mass in enumerate(MASSES):
            outcome, ratio = held.measure_mass(trial, mass)
            costs[mass] = held.sure(outcome)
            rows.append(held.row(outcome, ratio) | {"mass": mass, "bound": costs[mass][1]})
            self.progress("adaptive keep", number + 1, len(MASSES))
            if rows[-1]["drop"] > 3 * self.recipe.max_quality_drop:
                self.progress("adaptive keep", len(MASSES), len(MASSES))
                break  # smaller shares lose more
        best = smallest_allowed(costs, self.recipe.max_quality_drop)
        floor = int(np.quantile([len(item.prompt) for item in (*self.training, *self.held)], SHORTEST))
        return (None if best is None else Auto(best, floor)), rows

    def _choose_keep(self, trial: Trial, held: HeldOut) -> tuple[tuple[float, ...], bool]:
        """(keep ratios, contract met). Automatic: the smallest whose drop is allowed; 1 (dense) where there is none."""
        wanted, allowed, stages = self.recipe.wanted, self.recipe.max_quality_drop, held.stages(trial)
        if wanted is not None:
            ratios = keep_ratios(wanted, stages)
            if ratios[-1] == 1 and held.whole is held.dense:
                return ratios, True
            found = held.whole if ratios[-1] == 1 else held.measure(trial, wanted)
            return ratios, within(*held.sure(found), allowed)
        drops = {}
        for number, keep in enumerate(KEEPS):
            drops[keep] = held.sure(held.measure(trial, keep))
            self.progress("choose keep ratio", number + 1, len(KEEPS))
        best = smallest_allowed(drops, allowed)
        return keep_ratios(1.0 if best is None else best, stages), best is not None

    def _result(
        self, trial: Trial, keeps: tuple[float, ...], met: bool, seen: Sequence[Observation], held: HeldOut
    ) -> Calibration:
        dense, pruned = held.dense, keeps[-1] < 1
        metric = dense.metric
        outcome = held.measure(trial, keeps) if pruned else held.whole
        curves = self._curves(trial, held)
        auto, adaptive = self._adaptive(trial, held)
        # Where the contract failed and the bundle is dense, the least loss that was measured tells by how much.
        lost, possible = held.sure(outcome)
        if not (pruned or met):
            lost = min(held.drop(trial, keep) for keep in KEEPS)
        stages = trial.stages
        score = ", ".join(stage.score for stage in stages)
        probes = tuple(stage.own for stage in stages)
        example = self._example(trial, held)
        result = Calibration(trial.layers, probes, score, keeps, lost, metric, met, example, self.window, auto)
        low, high = interval(dense, outcome, metric, self.recipe.seed)
        lengths = sorted(len(item.prompt) for item in self.training)
        chosen = held.row(outcome, keeps[-1]) | {"layers": trial.layers, "keeps": keeps}
        result.report = {
            "items": len(self.training),
            "held_out": len(self.held),
            "score": score,
            "probes": [stage.name for stage in stages],
            "metric": metric,
            "prompt_tokens": {"median": lengths[len(lengths) // 2], "max": lengths[-1]},
            "dense": {"exact": float(dense.exact.mean()), "nll": float(dense.nll.mean())},
            "formats": None if held.whole is dense else held.row(held.whole, 1.0),
            "max_quality_drop": self.recipe.max_quality_drop,
            "candidates": held.candidates(),
            "chosen": chosen | {"interval": [low, high], "bound": possible} if pruned else None,
            "met": met,
            "curves": curves,
            "adaptive": {"chosen": None if auto is None else asdict(auto), "rows": adaptive},
            "sensitivity_by_layer": self._by_layer(seen),
            "seconds": self.seconds | {"measure": round(held.seconds, 2)},
        }
        return result

    def _example(self, trial: Trial, held: HeldOut) -> tuple[Item, Array, frozenset[int]]:
        """An item of usual length that the dense model answers."""
        right = held.dense.exact > 0
        shown = min(range(len(self.held)), key=lambda i: (not right[i], abs(len(self.held[i].prompt) - 160)))
        kept = held.kept(trial, SHOWN, shown)
        scores = SCORES["probe"](trial.evidence[shown]).astype(np.float64)
        return self.held[shown], scores, frozenset(kept.tolist())

    def _curves(self, trial: Trial, held: HeldOut) -> dict[str, list[dict[str, Any]]]:
        """Quality over keep ratio for the probe and, beside it, the baselines and the sensitivities themselves."""
        names = computable((*BASELINES, *TARGETS), trial.evidence[0])
        keeps = sorted({*CURVE, *held.measured(trial)}, reverse=True)
        out = {"probe": [held.row(held.measure(trial, k), k) for k in keeps]}
        for number, name in enumerate(names):
            out[name] = [held.row(held.measure(trial, k, name), k) for k in CURVE]
            self.progress("measure baselines", number + 1, len(names))
        return out

    def _by_layer(self, seen: Sequence[Observation]) -> list[float]:
        """Gate sensitivity at stake when pruning before each layer, as shares that sum to 1."""
        sums = torch.stack([o.gate.sum(1) for o in seen]).double().sum(0)
        return [float(share) for share in sums / sums.sum().clamp(min=1e-30)]
