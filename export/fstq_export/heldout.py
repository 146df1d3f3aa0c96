"""Measuring probes on held-out items: what a setting loses against dense, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_export.contract import Outcome, bound, drop, relative_cost
from fstq_export.recipe import Recipe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Cut, Item
from fstq_infer.fisher.prefix import Prefix
from fstq_infer.fisher.probe import Probe
from fstq_infer.fisher.prune import Pruned, pruned_outcome
from fstq_infer.fisher.scores import SCORES, Evidence
from fstq_infer.fisher.select import mass_count, select
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import Keep, keep_counts, keep_ratios

COMPARE = (0.5, 0.25)  # keep ratios at which candidate probes are compared
# (stage, item, scores of the tokens still there) -> how many stay
Count = Callable[[int, int, NDArray[np.floating]], int]
Key = tuple[str, tuple[int, ...], tuple[float, ...]]  # (probe or scorer, prune layers, keep ratios)


@dataclass(frozen=True, slots=True)
class Trial:
    """A probe before a layer. kind: "distilled", "tuned" or "carried"; score: the sensitivity it was distilled from.

    A stage that goes on with the scores of the one before is "carried", and probe is that stage's. before: the trials
    of earlier stages. evidence: of the held-out items before the first stage.
    """

    kind: str
    layer: int
    score: str
    probe: Probe
    evidence: Sequence[Evidence]
    before: tuple[Trial, ...] = ()

    @property
    def name(self) -> str:
        """Tells it from others in what is remembered of measurements."""
        if self.kind == "carried":
            return f"scores carried on from layer {self.before[-1].layer}"
        return f"{self.kind} from {self.score}, span {self.span}"

    @property
    def span(self) -> int:
        """Tokens that a score is summed over."""
        return self.probe.span_size

    @property
    def own(self) -> Probe | None:
        """The probe that runs at this stage, if one does."""
        return None if self.kind == "carried" else self.probe

    @property
    def stages(self) -> tuple[Trial, ...]:
        """All stages, this one last."""
        return (*self.before, self)

    @property
    def layers(self) -> tuple[int, ...]:
        """Their prune layers."""
        return tuple(trial.layer for trial in self.stages)


@dataclass(slots=True)
class HeldOut:
    """Held-out items and what was measured on them. seconds: that measuring took. prefix: of the layer last measured.

    dense: of the model without formats, what everything is compared with; whole: of the one that is measured, no token
    dropped.
    """

    decoder: Decoder
    items: Sequence[Item]
    dense: Outcome
    whole: Outcome
    recipe: Recipe
    window: int
    outcomes: dict[Key, Outcome] = field(default_factory=dict)
    seconds: float = 0.0
    prefix: Prefix | None = None

    def stages(self, trial: Trial) -> list[Stage]:
        """As the runtime knows them."""
        return [Stage(layer, self.recipe.sink, self.window) for layer in trial.layers]

    def measure(self, trial: Trial, keep: Keep, name: str | None = None) -> Outcome:
        """What keep ratios give, with the trial's probes, or in their place scorer ``name``; remembered.

        A scorer ranks the tokens once, before the first stage, and every stage cuts that ranking.
        """
        stages = self.stages(trial)
        ratios = keep_ratios(keep, stages)
        key = (name or trial.name, trial.layers, ratios)
        if key not in self.outcomes:
            counts = [keep_counts(e.tokens, ratios, stages) for e in trial.evidence]
            found = self.prune(trial, lambda stage, item, _scores: counts[item][stage], name)
            self.outcomes[key] = Outcome(found.exact.astype(np.float64), found.nll)
        return self.outcomes[key]

    def measure_mass(self, trial: Trial, mass: float) -> tuple[Outcome, float]:
        """(what adaptive keep with a share of the score mass gives, mean share of the tokens that stay)."""

        def count(stage: int, _item: int, scores: NDArray[np.floating]) -> int:
            return mass_count(scores, mass, self.recipe.sink, self.window, trial.stages[stage].span)

        found = self.prune(trial, count)
        shares = [len(kept) / e.tokens for kept, e in zip(found.cuts[-1].kept, trial.evidence, strict=True)]
        return Outcome(found.exact.astype(np.float64), found.nll), float(np.mean(shares))

    def measured(self, trial: Trial) -> set[float]:
        """The keep ratios below 1 that were measured, of those that a single number stands for."""
        stages = self.stages(trial)
        ratios = {keeps for name, layers, keeps in self.outcomes if (name, layers) == (trial.name, trial.layers)}
        return {keeps[-1] for keeps in ratios if keeps[-1] < 1 and keeps == keep_ratios(keeps[-1], stages)}

    def kept(self, trial: Trial, keep: Keep, item: int) -> NDArray[np.int64]:
        """Which tokens of one item stay after all stages."""
        stages = self.stages(trial)
        counts = keep_counts(trial.evidence[item].tokens, keep_ratios(keep, stages), stages)
        return self.prune(trial, lambda stage, _item, _scores: counts[stage], only=[item]).cuts[-1].kept[0]

    def prune(self, trial: Trial, count: Count, name: str | None = None, only: Sequence[int] | None = None) -> Pruned:
        """The held-out items (``only`` some of them), pruned at all stages."""
        chosen = range(len(self.items)) if only is None else only
        # What the first probe reads does not depend on pruning, so its scores are at hand.
        first = [SCORES[name or "probe"](trial.evidence[i]) for i in chosen]
        sink, window = self.recipe.sink, self.window

        def choose(stage: int, row: int, tokens: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
            item = chosen[row]
            found = scores if len(scores) else first[row][tokens]
            return tokens[select(found, count(stage, item, found), sink, window)]

        later = [None if name else stage.own for stage in trial.stages[1:]]
        started = time.monotonic()
        items = [self.items[i] for i in chosen]
        if self.prefix is None or self.prefix.layer != trial.layers[0]:
            self.prefix = Prefix(self.decoder, trial.layers[0])
        found = pruned_outcome(self.decoder, items, trial.layers, choose, [None, *later], self.prefix)
        self.seconds += time.monotonic() - started
        return found

    def drop(self, trial: Trial, keep: Keep) -> float:
        """Measured drop."""
        return drop(self.dense, self.measure(trial, keep), self.dense.metric)

    def sure(self, outcome: Outcome) -> tuple[float, float]:
        """(measured drop, the largest that is possible)."""
        metric = self.dense.metric
        return drop(self.dense, outcome, metric), bound(self.dense, outcome, metric, self.recipe.seed)

    def cost(self, trial: Trial, keep: Keep) -> float:
        """Relative prefill work."""
        return relative_cost(trial.layers, len(self.decoder.layers), keep_ratios(keep, self.stages(trial)))

    def rating(self, trial: Trial) -> tuple[float, float]:
        """(least relative work within the contract, total damage): lower is better."""
        drops = {keep: self.drop(trial, keep) for keep in COMPARE}
        allowed = [keep for keep, lost in drops.items() if lost <= self.recipe.max_quality_drop]
        work = min((self.cost(trial, keep) for keep in allowed), default=2.0)
        return work, sum(max(lost, 0.0) for lost in drops.values())

    def best_rating(self, trial: Trial) -> tuple[float, float]:
        """What no trial at the same layers can be better than: no damage at any keep ratio."""
        return min(self.cost(trial, keep) for keep in COMPARE), 0.0

    def candidates(self) -> list[dict[str, Any]]:
        """A row for every setting of a probe that was measured."""
        total = len(self.decoder.layers)
        return [
            self.row(outcome, keeps[-1])
            | {"layers": layers, "keeps": keeps, "probe": name, "relative_cost": relative_cost(layers, total, keeps)}
            for (name, layers, keeps), outcome in sorted(self.outcomes.items(), key=lambda entry: entry[0])
            if name not in SCORES
        ]

    def row(self, outcome: Outcome, keep: float) -> dict[str, Any]:
        """For the report."""
        lost = drop(self.dense, outcome, self.dense.metric)
        return {"keep": keep, "exact": float(outcome.exact.mean()), "nll": float(outcome.nll.mean()), "drop": lost}


def whole_outcome(decoder: Decoder, items: Sequence[Item]) -> Outcome:
    """What the model as it stands makes of items, no token dropped."""
    found = pruned_outcome(decoder, items, (), lambda _stage, _row, tokens, _scores: tokens)
    return Outcome(found.exact.astype(np.float64), found.nll)


def training_cuts(
    decoder: Decoder,
    items: Sequence[Item],
    trial: Trial,
    stages: Sequence[Stage],
    ratios: Sequence[Sequence[float]],
    seed: int,
) -> tuple[Cut, ...]:
    """What the stages of a trial leave of other items; for each of these, one of ``ratios`` is drawn."""
    drawn = np.random.default_rng(seed).integers(0, len(ratios), len(items))
    counts = [keep_counts(len(item.prompt), ratios[n], stages) for item, n in zip(items, drawn, strict=True)]

    def choose(stage: int, item: int, tokens: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
        return tokens[select(scores, counts[item][stage], stages[stage].sink, stages[stage].window)]

    return pruned_outcome(decoder, items, trial.layers, choose, [one.own for one in trial.stages]).cuts
