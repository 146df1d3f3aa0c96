"""Mixed precision: sensitivities -> formats under a budget -> a plan, its codes, and what it costs beside other rules.

Knows torch models and the order of these steps; formats, codes and the knapsack are in :mod:`fstq_infer.quant`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fstq_export.meter import Meter, quantized
from fstq_export.passes.quantize import Prints, fingerprints
from fstq_export.sensitivity import Collector, Damage, joined, weights
from fstq_export.tune import FEWEST_TEXTS, Tuned, default_steps, tune
from fstq_export.wanted import AUTO, Precision
from fstq_infer.errors import OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.quant.allocate import Choice, allocate
from fstq_infer.quant.codes import Quantized, quantize
from fstq_infer.quant.formats import FORMATS
from fstq_infer.quant.latency import Costs, Profile, Roofline
from fstq_infer.quant.plan import OPTIONAL, Group, Plan

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)
BITS = 5.0  # effective bits where nothing else is asked for
AUTOMATIC = ("int4-128", "int4-64", "int4-32", "int8", "fp16", "fp32")
LOW, HIGH = "int4-32", "int8"  # what rules without sensitivities choose between
ROUNDED = "plan, codes not trained"
DYNAMIC = "int8-dynamic"  # tried too where latency is the budget
KEPT = 50_000_000  # weights up to which codes of all formats stay in memory


@dataclass(frozen=True, slots=True)
class Result:
    """A plan, the codes of every weight in it, and what was measured (for the report).

    prints: by which the graph's weights are found, see :mod:`fstq_export.passes.quantize`.
    """

    plan: Plan
    weights: Mapping[str, Quantized]
    prints: Mapping[str, Prints]
    report: dict[str, Any]


class Planner:
    """One run over a model whose weights are left as they were."""

    def __init__(self, decoder: Decoder, wanted: Precision, dtype: str, seed: int, progress: Progress) -> None:
        self.decoder, self.wanted, self.seed, self.progress = decoder, wanted, seed, progress
        self.dtype = np.dtype(dtype)
        self.weights = weights(decoder)
        self.parameters = sum(weight.size for weight in self.weights.values())
        timed = (DYNAMIC,) if wanted.latency is not None else ()
        known = tuple(FORMATS) if wanted.profile is None else wanted.profile.formats
        self.formats = [
            name for name in (*timed, *AUTOMATIC) if name in known and not (dtype == "float16" and name == "fp32")
        ]
        missing = [name for name in self._named() if name not in known]
        if missing or not self.formats:
            raise OptionError(
                f"{wanted.profile.device if wanted.profile else 'this model'} has none of the formats asked for "
                f"({', '.join(missing) or 'automatic ones'}); it has {', '.join(known)}"
            )
        self.groups: dict[str, tuple[str, ...]] = {}
        self._damage: dict[tuple[str, str], float] = {}
        self._codes: dict[tuple[str, str], Quantized] = {}
        self._trace: dict[str, float] = {}
        self._profile: Costs | None = None
        self.rivals = True  # whether other rules are measured beside the plan
        self._fitted: Callable[[str], Damage | None] = lambda _name: None

    def _named(self) -> set[str]:
        """Formats that were asked for by name."""
        if self.wanted.plan is not None:
            return {group.format for group in self.wanted.plan.groups.values()}
        return set() if self.wanted.format in (None, AUTO) else {str(self.wanted.format)}

    def run(self, fitting: Sequence[Item], held: Sequence[Item]) -> Result:
        """fitting: texts that sensitivities come from, none for plain rounding; held: texts to measure on."""
        if not fitting and self.wanted.format == AUTO:
            raise OptionError("--precision auto needs calibration data, to know what each layer's errors cost: --calib")
        with tempfile.TemporaryDirectory(prefix="fstq-samples-") as folder:
            if fitting and not self._codes:  # kept codes serve another budget as well
                self._collect(fitting, Path(folder))
            elif not fitting:
                self.groups = {joined([name]): (name,) for name in self.weights}
            if self.wanted.plan is not None:
                known = self.groups if fitting else {n: g.weights for n, g in self.wanted.plan.groups.items()}
                self.wanted.plan.check(known, self.wanted.place)
                self._check_names(self.wanted.plan)
                self.groups = dict(known)
            formats = self._formats()
            rounded = self._codes_of(formats)
            trained = self._trained(rounded, fitting)
            codes = trained.codes if trained else rounded
            plan = self._plan(formats, trained)
            report = self._report(plan, codes, rounded, held) if fitting else None
            self._fitted = lambda _name: None
        prints = {
            name: fingerprints(weight.matrix.astype(self.dtype, copy=False)) for name, weight in self.weights.items()
        }
        return Result(plan, codes, prints, report or {"plan": _summary(plan), "measured": None})

    def _check_names(self, plan: Plan) -> None:
        """A plan that is followed without calibration data names weights itself."""
        named_once = [name for group in plan.groups.values() for name in group.weights]
        if sorted(named_once) != sorted(self.weights):
            odd = sorted(set(named_once) ^ set(self.weights)) or sorted(
                name for name in named_once if named_once.count(name) > 1
            )
            raise OptionError(
                f"{self.wanted.place}: its weights are not this model's, such as {odd[0]!a:.80}; take the names from a "
                "plan that 'fstq export' wrote for this model"
            )

    def _collect(self, fitting: Sequence[Item], folder: Path) -> None:
        collector = Collector(self.decoder, folder, self.seed)
        total = len(fitting)
        samples = collector.run(fitting, lambda done: self.progress("collect gradients", done, total))
        self.progress("collect gradients", total, total)
        self.groups = collector.groups
        last: dict[str, Damage] = {}

        def fitted(name: str) -> Damage:
            if name not in last:
                last.clear()  # one weight's statistics at a time
                last[name] = Damage(self.weights[name], samples)
            return last[name]

        self._fitted = fitted
        names = [name for group in self.groups.values() for name in group]
        for number, name in enumerate(names):
            self._trace[name] = fitted(name).trace()
            for form in dict.fromkeys((*self.formats, LOW, HIGH)):
                self._quantized(name, form)
            self.progress("try formats", number + 1, len(names))

    def _quantized(self, name: str, form: str) -> Quantized:
        """Codes of a weight; its damage is remembered."""
        key = (name, form)
        if key in self._codes:
            return self._codes[key]
        damage = self._fitted(name)
        if damage is None:
            codes = quantize(np.ascontiguousarray(self.weights[name].matrix), FORMATS[form])
        else:
            codes, self._damage[key] = damage.quantized(FORMATS[form])
        if self.parameters <= KEPT:
            self._codes[key] = codes
        return codes

    def _codes_of(self, formats: Mapping[str, str]) -> dict[str, Quantized]:
        """Codes of all weights; formats: by group."""
        return {name: self._quantized(name, formats[group]) for group, names in self.groups.items() for name in names}

    def _trained(self, codes: Mapping[str, Quantized], fitting: Sequence[Item]) -> Tuned | None:
        """Codes trained on the calibration texts, where steps were asked for or the model is small."""
        steps = default_steps(self.parameters) if self.wanted.tune is None else self.wanted.tune
        if not fitting:
            if self.wanted.tune:
                raise OptionError("--tune-codes needs texts to train on: --calib")
            return None
        if not steps or (self.wanted.tune is None and len(fitting) < FEWEST_TEXTS):
            return None

        def trained(done: int) -> None:
            self.progress("train codes", done, steps)

        try:
            return tune(self.decoder, self.weights, codes, fitting, steps, self.seed, trained)
        except OptionError as error:
            if self.wanted.tune is not None:
                raise
            _log.warning("codes are not trained: %s", error)
            return None

    def _formats(self) -> dict[str, str]:
        """group -> format, as asked for."""
        if self.wanted.plan is not None:
            return {name: self.wanted.plan.groups[name].format for name in self.groups}
        if self.wanted.format != AUTO:
            return dict.fromkeys(self.groups, str(self.wanted.format))
        if (target := self.wanted.latency) is not None:
            profile = self._device()

            def seconds(names: Sequence[str], form: str) -> float:
                return sum(self._seconds(profile, name, form, target.tokens) for name in names)

            return allocate(self._options(self.formats, self._damaged, seconds), target.seconds, "seconds")
        return allocate(self._options(self.formats, self._damaged), self._budget())

    def _damaged(self, name: str, form: str) -> float:
        return self._damage[name, form]

    def _device(self) -> Costs:
        """The device's profile, or a roofline of this machine."""
        if self._profile is None:
            self._profile = self.wanted.profile or Profile("roofline of the exporting machine", Roofline.measured())
        return self._profile

    def _seconds(self, profile: Costs, name: str, form: str, tokens: int) -> float:
        """What a weight takes in a call; the head sees the last token only, and rows are looked up in no time."""
        model: Any = self.decoder.model
        head = model.get_output_embeddings()
        total = 0.0
        outputs, inputs = self.weights[name].shape
        for site in self.weights[name].sites:
            if not site.lookup:
                count = 1 if site.module is head else tokens
                total += profile.seconds(outputs, inputs, form, count)
        return total

    def _budget(self) -> float:
        if self.wanted.bytes is not None:
            return float(self.wanted.bytes)
        return (self.wanted.bits or BITS) * self.parameters / 8

    def _options(
        self,
        formats: Sequence[str],
        damage: Callable[[str, str], float],
        cost: Callable[[Sequence[str], str], float] | None = None,
    ) -> dict[str, list[Choice]]:
        """cost: of weights in a format; default: their bytes."""
        cost = cost or self._bytes
        return {
            group: [
                Choice(form, sum(damage(name, form) for name in names), float(cost(names, form))) for form in formats
            ]
            for group, names in self.groups.items()
        }

    def _bytes(self, names: Sequence[str], form: str) -> int:
        return sum(FORMATS[form].bytes(*self.weights[name].shape) for name in names)

    def _plan(self, formats: Mapping[str, str], trained: Tuned | None) -> Plan:
        budget = self.wanted.format or f"as in {Path(self.wanted.place).name}"
        if self.wanted.format == AUTO:
            budget = (
                f"{self.wanted.bytes} bytes" if self.wanted.bytes else f"{self.wanted.bits or BITS:g} bits per weight"
            )
            budget = str(self.wanted.latency or budget)
        groups = {}
        for group, names in self.groups.items():
            form = formats[group]
            damage = sum(self._damage.get((name, form), 0.0) for name in names)
            size = sum(self.weights[name].size for name in names)
            groups[group] = Group(names, form, damage, self._bytes(names, form), size)
        steps, after = (trained.steps, trained.after) if trained else (None, None)
        latency, of = self._latency(formats)
        return Plan(groups, budget, steps, after, latency, of)

    def _latency(self, formats: Mapping[str, str]) -> tuple[float | None, str | None]:
        """(predicted seconds, of what and where); nothing where no time was asked for and no device is known."""
        if self.wanted.latency is None and self.wanted.profile is None:
            return None, None
        profile, tokens = self._device(), self.wanted.latency.tokens if self.wanted.latency else 1
        found = sum(
            self._seconds(profile, name, formats[group], tokens)
            for group, names in self.groups.items()
            for name in names
        )
        what = "a decoded token" if tokens == 1 else f"{tokens} prompt tokens"
        return found, f"{what}; {profile.device}"

    def _rules(self, size: int) -> dict[str, dict[str, str]]:
        """What other rules choose within ``size`` bytes: group -> format."""
        low, high = LOW, HIGH
        uniform = dict.fromkeys(self.groups, low)
        found = {"uniform int4": uniform}
        spent = sum(self._bytes(names, low) for names in self.groups.values())
        if spent > size:
            return found
        last = dict(uniform)
        for group in self._last_first():
            more = self._bytes(self.groups[group], high) - self._bytes(self.groups[group], low)
            if spent + more <= size:
                last[group], spent = high, spent + more
        found["last layers"] = last
        by_trace = self._options((low, high, "fp16"), lambda n, f: self._trace[n] * 4.0 ** -FORMATS[f].bits)
        found["Fisher trace"] = allocate(by_trace, float(size))
        return found

    def _last_first(self) -> list[str]:
        """Head and embedding first, then decoder layers from the last one down."""
        ends = [g for g in self.groups if not any(part.isdigit() for part in g.split("."))]
        return [*reversed(ends), *(g for g in reversed(self.groups) if g not in ends)]

    def _report(
        self, plan: Plan, codes: Mapping[str, Quantized], rounded: Mapping[str, Quantized], held: Sequence[Item]
    ) -> dict[str, Any]:
        rules = ({ROUNDED: plan.formats} if codes is not rounded else {}) | (
            self._rules(plan.bytes) if self.rivals else {}
        )
        meter = Meter(self.decoder, held)
        rows = [{"name": "unquantized", "bits": 32.0, "bytes": self.parameters * 4, "damage": 0.0, **meter.measure()}]
        for number, (name, formats) in enumerate({"plan": plan.formats, **rules}.items()):
            chosen = codes if name == "plan" else rounded if name == ROUNDED else self._codes_of(formats)
            size = sum(self._bytes(names, formats[group]) for group, names in self.groups.items())
            predicted = sum(self._damage[w, formats[g]] for g, names in self.groups.items() for w in names)
            if name == "plan" and plan.divergence is not None:
                predicted = plan.divergence
            with quantized(self.weights, chosen):
                measured = meter.measure()
            bits = 8 * size / self.parameters
            rows.append({"name": name, "bits": bits, "bytes": size, "damage": predicted, **measured})
            self.progress("measure formats", number + 1, len(rules) + 1)
        first = rows[0]
        for row in rows:
            row["drop"] = row["nll"] / first["nll"] - 1
        return {"plan": _summary(plan), "measured": {"texts": meter.texts, "tokens": meter.tokens, "rows": rows}}


def _summary(plan: Plan) -> dict[str, Any]:
    """A plan for the report."""
    groups = [
        {"name": name, "format": g.format, "bits": 8 * g.bytes / g.parameters, "bytes": g.bytes, "damage": g.damage}
        for name, g in plan.groups.items()
    ]
    totals = {"budget": plan.budget, "bits": plan.bits, "bytes": plan.bytes, "damage": plan.damage}
    extra = {key: value for key in OPTIONAL if (value := getattr(plan, key)) is not None}
    return totals | extra | {"groups": groups}
