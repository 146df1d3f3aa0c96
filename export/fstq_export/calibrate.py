"""Calibration: which tokens matter, where to prune, how many to keep, and what it costs. The quality contract is decided here.

Items are split into training and held-out ones. On the training items the dense model is observed and a probe is distilled and tuned;
on the held-out items every setting is measured, and the cheapest one that keeps the allowed quality is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fstq_infer.errors import CalibrationDataError, OptionError
from fstq_infer.fisher import train
from fstq_infer.fisher.gates import Observation, observe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.scores import BASELINES, SCORES, TARGETS, Evidence, Score
from fstq_infer.fisher.select import keep_count, select

KEEPS = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125)
CURVE = (0.5, 0.25, 0.125)
HELD_OUT, FEWEST = 300, 24
EXACT_ABOVE = 0.2  # dense exact match from which on exact match is the measure of quality

Array = NDArray[np.float64]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for. prune_layer, keep: None for automatic choice. max_quality_drop: fraction of dense quality."""

    prune_layer: int | None = None
    keep: float | None = None
    max_quality_drop: float = 0.01
    score: str = "gate"
    sink: int = 1
    window: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise OptionError(f"keep is {self.keep}; expected 'auto' or a ratio above 0 and at most 1")
        if not 0 <= self.max_quality_drop < 1:
            raise OptionError(
                f"max-quality-drop is {self.max_quality_drop}; expected a fraction from 0 to below 1, such as 0.01"
            )
        if self.score not in TARGETS:
            raise OptionError(f"score is '{self.score}'; expected one of {', '.join(TARGETS)}")
        if self.sink < 0 or self.window < 1:
            raise OptionError(f"sink is {self.sink} and window {self.window}; expected sink >= 0 and window >= 1")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Quality over the held-out items: per item exact match and negative log-likelihood (nats per answer token)."""

    exact: Array
    nll: Array

    def value(self, metric: str) -> float:
        """Mean exact match, or mean nll."""
        return float((self.exact if metric == "exact match" else self.nll).mean())


@dataclass(slots=True)
class Calibration:
    """The result: a probe for one layer, the chosen keep ratio, and everything that was measured on the way (for the report)."""

    layer: int
    probe: Probe
    keep: float
    drop: float
    metric: str
    met: bool
    example: tuple[Item, Array] | None = None
    report: dict[str, Any] = field(default_factory=dict)


def candidate_layers(layers: int) -> list[int]:
    """Prune layers to try: a quarter, a third and half of the way up; empty for a model of one layer."""
    return sorted({max(1, layers // d) for d in (4, 3, 2)}) if layers > 1 else []


def split(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """(training, held-out): a fifth is held out, at most 300 items. Raises CalibrationDataError when there are too few."""
    if len(items) < FEWEST:
        raise CalibrationDataError(
            f"found {len(items)} usable calibration items; at least {FEWEST} are needed to train a probe and to measure it on others"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    held = min(HELD_OUT, max(FEWEST // 3, len(items) // 5))
    return [items[i] for i in order[held:]], [items[i] for i in order[:held]]


def relative_cost(layer: int, layers: int, keep: float) -> float:
    """Prefill work relative to dense: all tokens below the prune layer, ``keep`` of them above."""
    return layer / layers + keep * (1 - layer / layers)


def drop(dense: Outcome, pruned: Outcome, metric: str) -> float:
    """Lost quality relative to dense: of exact match, or as relative increase of nll."""
    a, b = dense.value(metric), pruned.value(metric)
    return float((a - b) / max(a, 1e-9)) if metric == "exact match" else float((b - a) / max(a, 1e-9))


def interval(dense: Outcome, pruned: Outcome, metric: str, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`drop` over the held-out items, pairs kept together."""
    rng, n = np.random.default_rng(seed), len(dense.exact)
    rows = rng.integers(0, n, (draws, n))
    a = (dense.exact if metric == "exact match" else dense.nll)[rows].mean(1)
    b = (pruned.exact if metric == "exact match" else pruned.nll)[rows].mean(1)
    drops = ((a - b) if metric == "exact match" else (b - a)) / np.maximum(a, 1e-9)
    low, high = np.quantile(drops, (0.025, 0.975))
    return float(low), float(high)


class Calibrator:
    """One calibration run over a resident model."""

    def __init__(self, decoder: Decoder, items: Sequence[Item], recipe: Recipe, report: Report) -> None:
        self.decoder, self.recipe, self.report = decoder, recipe, report
        self.layers = len(decoder.layers)
        self.candidates = self._candidates()
        self.training, self.held = split(items, recipe.seed)
        self.seconds: dict[str, float] = {}
        self.outcomes: dict[tuple[str, int, float], Outcome] = {}
        self.width = int(decoder.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]

    def _candidates(self) -> list[int]:
        wanted = self.recipe.prune_layer
        if wanted is None:
            return candidate_layers(self.layers)
        if not 0 < wanted < self.layers:
            raise OptionError(
                f"prune-layer is {wanted}; this model has {self.layers} decoder layers, expected 1 to {self.layers - 1} or 'auto'"
            )
        return [wanted]

    def _timed(self, name: str, started: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)

    def _observe(self, items: Sequence[Item], label: str) -> list[Observation]:
        started = time.monotonic()
        found = observe(
            self.decoder, items, self.candidates, self.recipe.window, lambda n: self.report(label, n, len(items))
        )
        self._timed("observe", started)
        return found

    def _sensitivity(self, observation: Observation, layer: int) -> torch.Tensor:
        return observation.gate[layer] if self.recipe.score == "gate" else observation.embedding

    def _distilled(self, layer: int, seen: Sequence[Observation]) -> Probe:
        started = time.monotonic()
        torch.manual_seed(self.recipe.seed)
        heads = seen[0].window[layer].shape[0]
        probe = Probe(self.width, heads, self.recipe.window)
        targets = [train.target(self._sensitivity(o, layer).clone(), self.recipe.window) for o in seen]
        name = f"distil probe, layer {layer}"
        train.distill(
            probe,
            [o.inputs[layer] for o in seen],
            targets,
            self.recipe.seed,
            progress=lambda n: self.report(name, n, 8),
        )
        self._timed("distil", started)
        return probe

    def measure(self, name: str, score: Score, layer: int, keep: float, evidence: Sequence[Evidence]) -> Outcome:
        """Held-out outcome when ``score`` chooses the tokens; remembered under (name, layer, keep)."""
        key = (name, layer, keep)
        if key not in self.outcomes:
            started = time.monotonic()
            sink, window = self.recipe.sink, self.recipe.window

            def choose(indices: Sequence[int]) -> list[NDArray[np.int64]]:
                return [
                    select(score(evidence[i]), keep_count(evidence[i].tokens, keep, sink, window), sink, window)
                    for i in indices
                ]

            exact, nll = pruned_outcome(self.decoder, self.held, layer, choose)
            self.outcomes[key] = Outcome(exact.astype(np.float64), nll)
            self._timed("measure", started)
        return self.outcomes[key]

    def _evidence(self, layer: int, seen: Sequence[Observation], probe: Probe) -> list[Evidence]:
        out = []
        for index, o in enumerate(seen):
            with torch.no_grad():
                scores = probe(ProbeInput.pad([o.inputs[layer]]))[0].numpy()
            out.append(
                Evidence(
                    o.window[layer].float().numpy(),
                    o.gate[layer].numpy(),
                    o.embedding.numpy(),
                    scores,
                    self.recipe.seed * 1_000_003 + index,
                )
            )
        return out

    def run(self) -> Calibration | None:
        """The whole calibration; None for a model that has no layer to prune before."""
        if not self.candidates:
            return None
        recipe = self.recipe
        seen = self._observe(self.training, "observe training items")
        held = self._observe(self.held, "observe held-out items")
        dense = Outcome(np.array([float(o.exact) for o in held]), np.array([o.nll for o in held]))
        metric = "exact match" if dense.value("exact match") >= EXACT_ABOVE else "nll"
        probes = {layer: self._distilled(layer, seen) for layer in self.candidates}
        layer = self._best_layer(probes, held, dense, metric)
        distilled = self._evidence(layer, held, probes[layer])
        tuned = self._tuned(probes[layer], layer, seen)
        evidence = self._evidence(layer, held, tuned)

        def total(name: str, pool: list[Evidence]) -> float:
            return sum(
                drop(dense, self.measure(name, SCORES["probe"], layer, keep, pool), metric) for keep in (0.5, 0.25)
            )

        if total("probe", evidence) > total("distilled", distilled):
            tuned, evidence = probes[layer], distilled
            for keep in (0.5, 0.25):
                self.outcomes["probe", layer, keep] = self.outcomes["distilled", layer, keep]
        keep, met = self._choose_keep(layer, evidence, dense, metric)
        outcome = self.measure("probe", SCORES["probe"], layer, keep, evidence) if keep < 1 else dense
        curves = self._curves(layer, evidence, dense, metric)
        lost = drop(dense, outcome, metric)
        result = Calibration(layer, tuned, keep, lost, metric, met)
        shown = min(range(len(self.held)), key=lambda i: (not held[i].exact, abs(len(self.held[i].prompt) - 160)))
        result.example = (self.held[shown], SCORES["probe"](evidence[shown]).astype(np.float64))
        low, high = interval(dense, outcome, metric, recipe.seed)
        lengths = sorted(len(item.prompt) for item in self.training)
        result.report = {
            "items": len(self.training),
            "held_out": len(self.held),
            "score": recipe.score,
            "metric": metric,
            "prompt_tokens": {"median": lengths[len(lengths) // 2], "max": lengths[-1]},
            "dense": {"exact": dense.value("exact match"), "nll": dense.value("nll")},
            "max_quality_drop": recipe.max_quality_drop,
            "candidates": [
                self._row(dense, o, metric, k) | {"layer": at, "relative_cost": relative_cost(at, self.layers, k)}
                for (name, at, k), o in self.outcomes.items()
                if name == "probe" or (name == "distilled" and at != layer)
            ],
            "chosen": None
            if keep == 1
            else self._row(dense, outcome, metric, keep) | {"layer": layer, "interval": [low, high]},
            "met": met,
            "curves": curves,
            "sensitivity_by_layer": self._by_layer(seen),
            "seconds": self.seconds,
        }
        return result

    def _row(self, dense: Outcome, outcome: Outcome, metric: str, keep: float) -> dict[str, Any]:
        return {
            "keep": keep,
            "exact": outcome.value("exact match"),
            "nll": outcome.value("nll"),
            "drop": drop(dense, outcome, metric),
        }

    def _best_layer(self, probes: dict[int, Probe], held: Sequence[Observation], dense: Outcome, metric: str) -> int:
        """The candidate whose distilled probe allows the least work within the contract; failing that, the least harmful one."""
        if len(self.candidates) == 1:
            return self.candidates[0]
        rated = []
        for number, layer in enumerate(self.candidates):
            evidence = self._evidence(layer, held, probes[layer])
            drops = {
                k: drop(dense, self.measure("distilled", SCORES["probe"], layer, k, evidence), metric)
                for k in CURVE[:2]
            }
            cheap = min(
                (relative_cost(layer, self.layers, k) for k, d in drops.items() if d <= self.recipe.max_quality_drop),
                default=2.0,
            )
            rated.append((cheap, sum(max(d, 0.0) for d in drops.values()), layer))
            self.report("compare prune layers", number + 1, len(self.candidates))
        return min(rated)[2]

    def _tuned(self, probe: Probe, layer: int, seen: Sequence[Observation]) -> Probe:
        started = time.monotonic()
        tuned = Probe(self.width, seen[0].window[layer].shape[0], self.recipe.window)
        tuned.load_state_dict(probe.state_dict())
        steps = 400
        train.tune(
            tuned,
            self.decoder,
            layer,
            self.training,
            seen,
            self.recipe.sink,
            self.recipe.seed,
            steps,
            progress=lambda n: self.report(f"tune probe, layer {layer}", n, steps),
        )
        self._timed("tune", started)
        return tuned

    def _choose_keep(self, layer: int, evidence: Sequence[Evidence], dense: Outcome, metric: str) -> tuple[float, bool]:
        """(keep ratio, contract met). Automatic: from the largest ratio down as long as the drop is allowed; none: 1.0 (dense)."""
        recipe, score = self.recipe, SCORES["probe"]
        if recipe.keep is not None:
            if recipe.keep == 1:
                return 1.0, True
            return recipe.keep, drop(
                dense, self.measure("probe", score, layer, recipe.keep, evidence), metric
            ) <= recipe.max_quality_drop
        best = 1.0
        for number, keep in enumerate(KEEPS):
            self.report("choose keep ratio", number + 1, len(KEEPS))
            if drop(dense, self.measure("probe", score, layer, keep, evidence), metric) > recipe.max_quality_drop:
                break
            best = keep
        self.report("choose keep ratio", len(KEEPS), len(KEEPS))
        return best, best < 1

    def _curves(
        self, layer: int, evidence: Sequence[Evidence], dense: Outcome, metric: str
    ) -> dict[str, list[dict[str, Any]]]:
        """Quality over keep ratio for the probe and, beside it, the baselines and the sensitivity it was distilled from."""
        names = ("probe", *BASELINES, self.recipe.score)
        out: dict[str, list[dict[str, Any]]] = {}
        for number, name in enumerate(names):
            keeps = sorted(
                {*CURVE, *(k for (n, at, k) in self.outcomes if n == name and at == layer and k < 1)}, reverse=True
            )
            out[name] = [
                self._row(dense, self.measure(name, SCORES[name], layer, k, evidence), metric, k) for k in keeps
            ]
            self.report("measure baselines", number + 1, len(names))
        return out

    def _by_layer(self, seen: Sequence[Observation]) -> list[float]:
        """Gate sensitivity that each prune layer would put at stake, relative to pruning before layer 0."""
        sums = torch.stack([o.gate.sum(1) for o in seen]).double().sum(0)
        shares = sums / sums.sum().clamp(min=1e-30)
        return [float(x) for x in shares]
