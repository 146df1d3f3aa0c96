"""Calibration: which tokens matter, where to prune, how many to keep, and what it costs.

Items are split into training and held-out ones. On the training items the dense model is observed and probes are
distilled, one for each candidate layer and sensitivity. On the held-out items settings are measured, and the cheapest
one that keeps the allowed quality is chosen.
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
from numpy.typing import NDArray

from fstq_export.contract import (
    SLACK,
    Array,
    Outcome,
    bound,
    candidate_layers,
    drop,
    interval,
    relative_cost,
    smallest_allowed,
    split,
    within,
)
from fstq_infer.errors import OptionError
from fstq_infer.fisher import train
from fstq_infer.fisher.gates import Observation, observe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.scores import BASELINES, SCORES, TARGETS, Evidence, Score, computable
from fstq_infer.fisher.select import keep_count, mass_count, select
from fstq_infer.runtime.options import Auto

KEEPS = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125)
CURVE = (0.5, 0.25, 0.125)
COMPARE = (0.5, 0.25)  # keep ratios at which candidate probes are compared
MASSES = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the score mass that adaptive keep tries
SHORTEST = 0.01  # share of the calibration prompts that count as too short to prune adaptively
WINDOW = 4  # so many last tokens always stay; the rest of the question has to earn its place like any other token
EPOCHS, STEPS = 5, 400
SPAN, SPANS = 9, (1, 5, 13, 17)  # neighbours that a score is averaged over: at first, and what else is tried

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for.

    prune_layer, keep: None for automatic choice. max_quality_drop: fraction of dense quality. score: the sensitivity
    that the probe learns; 'auto' tries each and keeps what measures best. window: None for 4 last tokens that stay, and
    without calibration as many as the probe reads.
    """

    prune_layer: int | None = None
    keep: float | None = None
    max_quality_drop: float = 0.01
    score: str = "auto"
    sink: int = 1
    window: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise OptionError(f"keep is {self.keep}; expected 'auto' or a ratio above 0 and at most 1")
        if not 0 <= self.max_quality_drop < 1:
            found = f"max-quality-drop is {self.max_quality_drop}"
            raise OptionError(f"{found}; expected a fraction from 0 to below 1, such as 0.01")
        if self.score not in ("auto", *TARGETS):
            raise OptionError(f"score is '{self.score}'; expected 'auto' or one of {', '.join(TARGETS)}")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"seed is {self.seed}; expected a whole number from 0 to 4294967295")
        if self.sink < 0 or (self.window is not None and self.window < 1):
            raise OptionError(f"sink is {self.sink} and window {self.window}; expected sink >= 0 and window >= 1")


@dataclass(slots=True)
class Calibration:
    """The result: a probe for one layer, the chosen keep ratio, and what was measured on the way (for the report).

    score: the sensitivity that the probe was distilled from. example: a held-out item and its tokens' scores.
    auto: the share of the score mass that keeps the contract, if any.
    """

    layer: int
    probe: Probe
    score: str
    keep: float
    drop: float
    metric: str
    met: bool
    example: tuple[Item, Array]
    auto: Auto | None = None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """A probe on the held-out items. kind: "distilled" or "tuned"; score: the sensitivity it was distilled from."""

    kind: str
    layer: int
    score: str
    probe: Probe
    evidence: Sequence[Evidence]

    @property
    def name(self) -> str:
        """Tells it from others in what is remembered of measurements."""
        return f"{self.kind} from {self.score}, span {self.span}"

    @property
    def span(self) -> int:
        """Tokens that a score is summed over."""
        return int(self.probe.span.shape[2])


class Calibrator:
    """One calibration run over a resident model."""

    def __init__(self, decoder: Decoder, items: Sequence[Item], recipe: Recipe, progress: Progress) -> None:
        self.decoder, self.recipe, self.progress = decoder, recipe, progress
        self.layers = len(decoder.layers)
        self.window = WINDOW if recipe.window is None else recipe.window
        self.candidates = self._candidates()
        self.training, self.held = split(items, recipe.seed)
        self.seconds: dict[str, float] = {}
        self.outcomes: dict[tuple[str, int, float], Outcome] = {}

    def _candidates(self) -> list[int]:
        wanted = self.recipe.prune_layer
        if self.layers < 2:
            raise OptionError("this model has one decoder layer, nothing to prune before; export without --calib")
        if wanted is None:
            return candidate_layers(self.layers)
        if not 0 < wanted < self.layers:
            found = f"prune-layer is {wanted}; this model has {self.layers} decoder layers"
            raise OptionError(f"{found}, expected 1 to {self.layers - 1} or 'auto'")
        return [wanted]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)

    def run(self) -> Calibration:
        """The whole calibration."""
        seen = self._observe(self.training, "observe training items")
        held = self._observe(self.held, "observe held-out items", published=True)
        dense = Outcome(np.array([float(o.exact) for o in held]), np.array([o.nll for o in held]))
        lossless = bound(dense, dense, dense.metric, self.recipe.seed)
        if lossless > SLACK * self.recipe.max_quality_drop and self.recipe.keep is None:
            _log.warning(
                "%d held-out items cannot bear out a drop within %g: even without one loss up to %.3g is possible, so "
                "no keep ratio will be claimed. Give more items (--calib, --calib-items) or allow a larger drop",
                len(held),
                self.recipe.max_quality_drop,
                lossless,
            )
        trials = list(self._distilled(seen, held, dense))
        best = min(trials, key=lambda trial: self._rating(trial, dense))
        spans = [self._trial(best.kind, best.layer, best.score, best.probe.with_span(n), held) for n in SPANS]
        best = min((best, *spans), key=lambda trial: self._rating(trial, dense))
        if best.score == "gate":
            # Tuning lifts gate-distilled probes; those distilled from embedding scores lost by it at every setting.
            tuned = self._tuned(best, seen, held)
            best = min((best, tuned), key=lambda trial: self._rating(trial, dense))
        keep, met = self._choose_keep(best, dense)
        return self._result(best, keep, met, dense, seen, held)

    def _observe(self, items: Sequence[Item], label: str, published: bool = False) -> list[Observation]:
        with self._timed("observe"):
            count = len(items)

            def report(done: int) -> None:
                self.progress(label, done, count)

            return observe(self.decoder, items, self.candidates, progress=report, published=published)

    def _distilled(self, seen: Sequence[Observation], held: Sequence[Observation], dense: Outcome) -> Iterator[Trial]:
        """A trial for each candidate layer and sensitivity, measured."""
        scores = TARGETS if self.recipe.score == "auto" else (self.recipe.score,)
        total = len(self.candidates) * len(scores) * EPOCHS
        done = 0
        for layer in self.candidates:
            for score in scores:
                torch.manual_seed(self.recipe.seed)
                width = seen[0].inputs[layer].states.shape[-1] // 2
                probe = Probe(width, seen[0].window[layer].shape[0], window=self.window)
                wanted = [o.gate[layer] if score == "gate" else o.embedding for o in seen]
                targets = [train.target(sensitivity.clone(), self.window) for sensitivity in wanted]
                inputs = [o.inputs[layer] for o in seen]

                def report(epoch: int, before: int = done) -> None:
                    self.progress("distil probes", before + epoch, total)

                with self._timed("distil"):
                    train.distill(probe, inputs, targets, self.recipe.seed, EPOCHS, report)
                done += EPOCHS
                yield self._trial("distilled", layer, score, probe.with_span(SPAN), held)

    def _trial(self, kind: str, layer: int, score: str, probe: Probe, held: Sequence[Observation]) -> Trial:
        evidence = []
        for index, o in enumerate(held):
            with torch.no_grad():
                scores = probe(ProbeInput.pad([o.inputs[layer]]))[0].numpy()
            evidence.append(o.evidence(layer, scores, self.recipe.seed * 1_000_003 + index))
        return Trial(kind, layer, score, probe, evidence)

    def _rating(self, trial: Trial, dense: Outcome) -> tuple[float, float]:
        """(least relative work within the contract, total damage): lower is better."""
        drops = {keep: self._drop(trial, keep, dense) for keep in COMPARE}
        allowed = [keep for keep, lost in drops.items() if lost <= self.recipe.max_quality_drop]
        work = min((relative_cost(trial.layer, self.layers, keep) for keep in allowed), default=2.0)
        return work, sum(max(lost, 0.0) for lost in drops.values())

    def _tuned(self, best: Trial, seen: Sequence[Observation], held: Sequence[Observation]) -> Trial:
        """The best trial's probe, tuned through soft gates."""
        probe = Probe.from_arrays(best.probe.arrays(), window=self.window)
        label = f"tune probe, layer {best.layer}"
        with self._timed("tune"):
            train.tune(
                probe,
                self.decoder,
                best.layer,
                self.training,
                seen,
                self.recipe.sink,
                self.recipe.seed,
                STEPS,
                progress=lambda n: self.progress(label, n, STEPS),
            )
        return self._trial("tuned", best.layer, best.score, probe, held)

    def _measure(self, name: str, trial: Trial, keep: float) -> Outcome:
        """Held-out outcome when strategy ``name`` (the trial's own probe: its name) chooses the tokens; remembered."""
        key = (name, trial.layer, keep)
        if key not in self.outcomes:
            score = SCORES["probe" if name == trial.name else name]
            counts = [keep_count(e.tokens, keep, self.recipe.sink, self.window) for e in trial.evidence]
            self.outcomes[key] = self._pruned(trial, score, counts)
        return self.outcomes[key]

    def _pruned(self, trial: Trial, score: Score, counts: Sequence[int]) -> Outcome:
        """Held-out outcome when of each item so many tokens stay."""
        sink, window = self.recipe.sink, self.window

        def choose(indices: Sequence[int]) -> list[NDArray[np.int64]]:
            return [select(score(trial.evidence[i]), counts[i], sink, window) for i in indices]

        with self._timed("measure"):
            exact, nll = pruned_outcome(self.decoder, self.held, trial.layer, choose)
        return Outcome(exact.astype(np.float64), nll)

    def _adaptive(self, trial: Trial, dense: Outcome) -> tuple[Auto | None, list[dict[str, Any]]]:
        """(adaptive keep that meets the contract with the fewest tokens, what each share of the mass gave)."""
        rows, costs = [], {}
        sizes = np.array([e.tokens for e in trial.evidence])
        scores = [SCORES["probe"](e) for e in trial.evidence]
        for number, mass in enumerate(MASSES):
            counts = [mass_count(s, mass, self.recipe.sink, self.window, trial.span) for s in scores]
            outcome = self._pruned(trial, SCORES["probe"], counts)
            possible = bound(dense, outcome, dense.metric, self.recipe.seed)
            ratio = float((np.array(counts) / sizes).mean())
            rows.append(self._row(dense, outcome, ratio) | {"mass": mass, "bound": possible})
            costs[mass] = rows[-1]["drop"], possible
            self.progress("adaptive keep", number + 1, len(MASSES))
            if rows[-1]["drop"] > 3 * self.recipe.max_quality_drop:
                self.progress("adaptive keep", len(MASSES), len(MASSES))
                break  # smaller shares lose more
        best = smallest_allowed(costs, self.recipe.max_quality_drop)
        floor = int(np.quantile([len(item.prompt) for item in (*self.training, *self.held)], SHORTEST))
        return (None if best is None else Auto(best, floor)), rows

    def _drop(self, trial: Trial, keep: float, dense: Outcome) -> float:
        return drop(dense, self._measure(trial.name, trial, keep), dense.metric)

    def _cost(self, trial: Trial, keep: float, dense: Outcome) -> tuple[float, float]:
        """(measured drop, the largest that is possible)."""
        pruned = self._measure(trial.name, trial, keep)
        return drop(dense, pruned, dense.metric), bound(dense, pruned, dense.metric, self.recipe.seed)

    def _choose_keep(self, trial: Trial, dense: Outcome) -> tuple[float, bool]:
        """(keep ratio, contract met). Automatic: the smallest whose drop is allowed; none: 1 (dense)."""
        wanted, allowed = self.recipe.keep, self.recipe.max_quality_drop
        if wanted is not None:
            return wanted, wanted == 1 or within(*self._cost(trial, wanted, dense), allowed)
        drops = {}
        for number, keep in enumerate(KEEPS):
            drops[keep] = self._cost(trial, keep, dense)
            self.progress("choose keep ratio", number + 1, len(KEEPS))
        best = smallest_allowed(drops, allowed)
        return (best, True) if best is not None else (1.0, False)

    def _result(
        self,
        trial: Trial,
        keep: float,
        met: bool,
        dense: Outcome,
        seen: Sequence[Observation],
        held: Sequence[Observation],
    ) -> Calibration:
        metric = dense.metric
        outcome = self._measure(trial.name, trial, keep) if keep < 1 else dense
        curves = self._curves(trial, dense)
        auto, adaptive = self._adaptive(trial, dense)
        shown = min(range(len(held)), key=lambda i: (not held[i].exact, abs(len(self.held[i].prompt) - 160)))
        example = (self.held[shown], SCORES["probe"](trial.evidence[shown]).astype(np.float64))
        # Where the contract failed and the bundle is dense, the least loss that was measured tells by how much.
        lost = drop(dense, outcome, metric) if keep < 1 or met else min(self._drop(trial, k, dense) for k in KEEPS)
        result = Calibration(trial.layer, trial.probe, trial.score, keep, lost, metric, met, example, auto)
        low, high = interval(dense, outcome, metric, self.recipe.seed)
        lengths = sorted(len(item.prompt) for item in self.training)
        probes = [key for key in self.outcomes if key[0] not in SCORES]
        result.report = {
            "items": len(self.training),
            "held_out": len(self.held),
            "score": trial.score,
            "probe": trial.name,
            "metric": metric,
            "prompt_tokens": {"median": lengths[len(lengths) // 2], "max": lengths[-1]},
            "dense": {"exact": float(dense.exact.mean()), "nll": float(dense.nll.mean())},
            "max_quality_drop": self.recipe.max_quality_drop,
            "candidates": [
                self._row(dense, self.outcomes[name, at, k], k)
                | {"layer": at, "probe": name, "relative_cost": relative_cost(at, self.layers, k)}
                for name, at, k in sorted(probes)
            ],
            "chosen": None
            if keep == 1
            else self._row(dense, outcome, keep)
            | {"layer": trial.layer, "interval": [low, high], "bound": bound(dense, outcome, metric, self.recipe.seed)},
            "met": met,
            "curves": curves,
            "adaptive": {"chosen": None if auto is None else asdict(auto), "rows": adaptive},
            "sensitivity_by_layer": self._by_layer(seen),
            "seconds": self.seconds,
        }
        return result

    def _row(self, dense: Outcome, outcome: Outcome, keep: float) -> dict[str, Any]:
        lost = drop(dense, outcome, dense.metric)
        return {"keep": keep, "exact": float(outcome.exact.mean()), "nll": float(outcome.nll.mean()), "drop": lost}

    def _curves(self, trial: Trial, dense: Outcome) -> dict[str, list[dict[str, Any]]]:
        """Quality over keep ratio for the probe and, beside it, the baselines and the sensitivities themselves."""
        names = computable((*BASELINES, *TARGETS), trial.evidence[0])
        measured = {keep for name, at, keep in self.outcomes if name == trial.name and at == trial.layer and keep < 1}
        keeps = sorted({*CURVE, *measured}, reverse=True)
        out = {"probe": [self._row(dense, self._measure(trial.name, trial, k), k) for k in keeps]}
        for number, name in enumerate(names):
            out[name] = [self._row(dense, self._measure(name, trial, k), k) for k in CURVE]
            self.progress("measure baselines", number + 1, len(names))
        return out

    def _by_layer(self, seen: Sequence[Observation]) -> list[float]:
        """Gate sensitivity at stake when pruning before each layer, as shares that sum to 1."""
        sums = torch.stack([o.gate.sum(1) for o in seen]).double().sum(0)
        return [float(share) for share in sums / sums.sum().clamp(min=1e-30)]
