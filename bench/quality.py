"""Quality of pruned answers, probe against published scorers, on unseen questions and texts, over several seeds.

python bench/quality.py --seeds 5      hours on 2 cores; writes results/quality.json
python bench/quality.py --short        minutes: one seed, few items, the demo model; exits with 1 where a baseline wins
python bench/quality.py --partial DIR  keeps what was measured for each model and seed in DIR, and goes on from there

The probe's rows come from the exported ONNX Runtime engine: greedy text for first questions, teacher-forced tokens for
second ones (asked about a context that was pruned for the first) and for continuations. Baselines prune in torch, at
the same layer, with the same forced tokens, on the same items; they read what a graph that prunes there does not have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, target, write
from fstq_export import data, source
from fstq_export.calibrate import WINDOW
from fstq_export.command import bars
from fstq_export.demo.run import is_exact, room
from fstq_export.pipeline import Request, export
from fstq_export.recipe import Recipe
from fstq_export.reference import reference
from quality_tasks import DEMO, RECALL, SECOND, STORIES, Task, Test, tasks

from fstq_infer import Generator
from fstq_infer.atomic import replace_file
from fstq_infer.fisher.gates import observe
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.prefix import Prefix
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.scores import BASELINES, SCORES, computable
from fstq_infer.fisher.select import keep_count, select
from fstq_infer.runtime.options import keep_counts, keep_ratios

KEEPS = (0.5, 0.25, 0.125)
ONE, TWO = "one stage", "two stages"  # rows of a bundle with two stages
FIRST = 1.4  # two stages: the first keeps so many times what one stage keeps at equal compute
WEAK = {"recency": 0.5, "snapkv": 0.15}  # what these answer of the recall questions at keep 50 %, at most
Values = dict[tuple[int, str, float], list[float]]  # (prompt length, scorer, keep) -> one value per item


def engine_hits(generator: Generator, test: Test, keep: Any) -> tuple[list[float], list[float]]:
    """(whether each answer is exact, share of each prompt that was kept)."""
    hits, kept = [], []
    for example in test.examples:
        wanted = str(example.answer)
        result = generator.generate(example.prompt, keep=keep, max_tokens=room(generator, wanted))
        hits.append(float(is_exact(result, wanted)))
        kept.append(len(result.kept) / len(result.prompt_tokens))
    return hits, kept


class Forced:
    """One text through the engine, call by call; ``logits`` are those of its last token."""

    def __init__(self, generator: Generator) -> None:
        self.engine, self.position = generator.engine, 0
        self.cache = self.engine.empty_cache(1)
        self.logits: Any = None

    def feed(self, ids: Sequence[int], keep: Sequence[int]) -> None:
        """keep: tokens of this call that stay, by stage."""
        positions = np.arange(self.position, self.position + len(ids))[None]
        step = self.engine.forward(np.array([ids]), positions, np.array([keep], np.int64), self.cache)
        self.cache, self.logits, self.position = step.cache, step.logits[0], self.position + len(ids)


def engine_forced(generator: Generator, tokens: Any, test: Test, keep: float, metric: str) -> list[float]:
    """Exact match or nll of each answer, its tokens fed one by one after the pruned prompt and the bridge."""
    stages, values = generator.engine.stages, []
    for index in range(len(test.examples)):
        item, bridge = encoded(tokens, test, index)
        text = Forced(generator)
        text.feed(item.prompt, keep_counts(len(item.prompt), keep_ratios(keep, stages), stages))
        if bridge:
            text.feed(bridge, [len(bridge)] * len(stages))
        losses, hits = [], []
        for token in item.answer:
            top = text.logits.max()
            losses.append(float(top + np.log(np.exp(text.logits - top).sum()) - text.logits[token]))
            hits.append(int(text.logits.argmax()) == token)
            text.feed((token,), [1] * len(stages))
        values.append(float(all(hits)) if metric == "exact" else float(np.mean(losses)))
    return values


def encoded(tokens: Any, test: Test, index: int) -> tuple[Item, tuple[int, ...]]:
    """(prompt and answer, bridge) of one item as token ids."""
    item = data.encode(tokens, test.examples[index])
    bridge = f" {test.bridges[index]}" if test.bridges else ""
    return item, tuple(tokens.encode(bridge, add_special_tokens=False)) if bridge else ()


def baselines(task: Task, test: Test, recipe: Recipe, metric: str) -> dict[tuple[str, float], list[float]]:
    """Exact match or nll of each item, for every published scorer and keep ratio."""
    found = source.resolve(str(task.model), None)
    tokens = source.tokenizer(found)
    pairs = [encoded(tokens, test, i) for i in range(len(test.examples))]
    whole = [Item(item.prompt + bridge, item.answer) for item, bridge in pairs]
    out = {}
    with reference(found, stream=False) as decoder:
        seen = observe(decoder, [item for item, _ in pairs], (task.layer,), published=True)
        evidence = [o.evidence(task.layer, seed=recipe.seed * 1_000_003 + i) for i, o in enumerate(seen)]
        prefix = Prefix(decoder, task.layer)
        for name in computable(BASELINES, evidence[0]):
            scores = [SCORES[name](e) for e in evidence]
            for keep in KEEPS:

                def choose(
                    _stage: int, i: int, tokens: Any, _own: Any, keep: float = keep, scores: Any = scores
                ) -> Any:
                    count = keep_count(len(scores[i]), keep, recipe.sink, WINDOW)
                    return np.append(select(scores[i], count, recipe.sink, WINDOW), tokens[len(scores[i]) :])

                pruned = pruned_outcome(decoder, whole, (task.layer,), choose, prefix=prefix)
                out[name, keep] = (pruned.exact if metric == "exact" else pruned.nll).astype(float).tolist()
    return out


def equal_compute(keep: float, layers: tuple[int, int], total: int) -> tuple[float, float]:
    """Keep ratios of two stages whose decoder layers see as many tokens as with ``keep`` from the first layer on."""
    (first, second), larger = layers, min(1.0, FIRST * keep)
    return larger, (keep * (total - first) - larger * (second - first)) / (total - second)


def stages(task: Task, layers: tuple[int, int], seed: int, folder: Path) -> Values:
    """Two stages against one at equal compute; a bundle with two stages whose second drops nothing has one."""
    recipe = Recipe(prune_layer=layers, keep=0.25, max_quality_drop=0.02, seed=seed)
    with bars() as progress:
        done = export(Request(str(task.model), folder / "stages", recipe, task.calibration, overwrite=True), progress)
    generator, values = Generator.load(done.path), {}
    for length, test in task.tests.items():
        for keep in KEEPS:
            values[length, ONE, keep] = engine_hits(generator, test, (keep, keep))[0]
            both = equal_compute(keep, layers, done.report["model"]["layers"])
            values[length, TWO, keep] = engine_hits(generator, test, both)[0]
    return values


def measure(task: Task, seed: int, folder: Path) -> dict[str, Values]:
    """Name of the task, or of its second questions -> values; the scorer "dense" has keep 1.

    "kept" holds the shares that adaptive keep came to; "fixed at that keep" keeps their mean of every prompt. Rows of
    one and two stages have the keep ratio of the one; see :func:`stages`.
    """
    recipe = Recipe(prune_layer=task.layer, keep=0.25, max_quality_drop=0.02, seed=seed)
    with bars() as progress:
        done = export(Request(str(task.model), folder / "bundle", recipe, task.calibration, overwrite=True), progress)
    generator = Generator.load(done.path)
    tokens = source.tokenizer(source.resolve(str(task.model), None))
    out: dict[str, Values] = {task.name: {}}
    for length, test in task.tests.items():
        values = out[task.name]
        for keep in (1.0, *KEEPS):
            name = "dense" if keep == 1 else "probe"
            if task.metric == "exact":
                values[length, name, keep] = engine_hits(generator, test, keep)[0]
            else:
                values[length, name, keep] = engine_forced(generator, tokens, test, keep, task.metric)
        if task.metric == "exact" and generator.defaults.auto is not None:
            values[length, "adaptive", 0.0], values[length, "kept", 0.0] = engine_hits(generator, test, "auto")
            kept = float(np.mean(values[length, "kept", 0.0]))
            values[length, "fixed at that keep", 0.0] = engine_hits(generator, test, kept)[0]
        values |= {(length, *key): v for key, v in baselines(task, test, recipe, task.metric).items()}
    if task.stages is not None and seed == 0:
        out[task.name] |= stages(task, task.stages, seed, folder)
    for length, test in (task.again or {}).items():
        values = out.setdefault(SECOND, {})
        for keep in (1.0, *KEEPS):
            name = "dense" if keep == 1 else "probe"
            values[length, name, keep] = engine_forced(generator, tokens, test, keep, "exact")
        values |= {(length, *key): v for key, v in baselines(task, test, recipe, "exact").items()}
    return out


def remembered(task: Task, seed: int, scratch: Path, partial: Path | None) -> dict[str, Values]:
    """:func:`measure`, or what it found before and left in ``partial``."""
    if partial is None:
        return measure(task, seed, scratch)
    path = partial / f"{task.name}-{seed}.json"
    if not path.exists():
        found = measure(task, seed, scratch)
        rows = [[name, *key, values] for name, more in found.items() for key, values in more.items()]
        replace_file(path, json.dumps(rows).encode())
    out: dict[str, Values] = {}
    for name, length, scorer, keep, values in json.loads(path.read_text(encoding="utf-8")):
        out.setdefault(name, {})[length, scorer, keep] = values
    return out


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap interval over items."""
    found = np.array(values, float)
    means = np.random.default_rng(0).choice(found, (2000, len(found))).mean(1)
    return float(found.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def rows_of(name: str, metric: str, values: Values) -> list[dict[str, Any]]:
    """A row for every length, scorer and keep ratio."""
    rows = []
    for (length, scorer, keep), found in values.items():
        if scorer == "kept":
            continue
        if keep == 0:
            keep = float(np.mean(values[length, "kept", 0.0]))
        mean, low, high = interval(found)
        dense = float(np.mean(values[length, "dense", 1.0]))
        row = {"model": name, "tokens": length, "scorer": scorer, "keep": keep, metric: mean, "low": low, "high": high}
        rows.append(row | {"dense": dense, "items": len(found)})
    return rows


def targets_of(name: str, metric: str, wanted: dict[float, float], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was asked for, beside what was measured."""
    found = {}
    for row in rows:
        keep, place = row["keep"], f"{name}, {row['tokens']} tokens, keep {row['keep']:.1%}"
        others = [r for r in rows if (r["tokens"], r["keep"]) == (row["tokens"], keep)]
        if row["scorer"] == "probe":
            if keep in wanted:
                share = row[metric] / max(row["dense"], 1e-9)
                found[f"{place}: exact match over dense"] = target(share, wanted[keep])
            if keep <= 0.25:
                loss = {r["scorer"]: abs(r["dense"] - r[metric]) * lost(metric, r) for r in others}
                best = min(v for k, v in loss.items() if k in BASELINES)
                found[f"{place}: damage over the best baseline's"] = target(loss["probe"] / max(best, 1e-9), 0.6, False)
        if row["scorer"] == TWO:
            one = next(r for r in others if r["scorer"] == ONE)
            found[f"{place}: two stages minus one at equal compute, exact match"] = target(
                row[metric] - one[metric], 0.0
            )
        if row["scorer"] == "adaptive":
            fixed = next(r for r in others if r["scorer"] == "fixed at that keep")
            found[f"{place}: adaptive minus fixed keep, exact match"] = target(row[metric] - fixed[metric], 0.0)
        if name == RECALL and keep == 0.5 and row["scorer"] in WEAK:
            found[f"{name}, {row['scorer']} at keep 50 %"] = target(row[metric], WEAK[row["scorer"]], at_least=False)
    return found


def lost(metric: str, row: dict[str, Any]) -> int:
    """1 where a row is worse than dense, -1 where it is better."""
    return 1 if (row[metric] < row["dense"]) == (metric == "exact") else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", help="a task's name")
    parser.add_argument("--partial", type=Path, help="folder of what has been measured so far")
    arguments = parser.parse_args()
    seeds = 1 if arguments.short else arguments.seeds
    values: dict[str, Values] = {}
    kinds: dict[str, Task] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(prefix="fstq-bench-") as scratch:
            for task in tasks(Path(scratch), seed, arguments.short, arguments.only):
                kinds |= {task.name: task, **({SECOND: task} if task.again else {})}
                for name, found in remembered(task, seed, Path(scratch), arguments.partial).items():
                    for key, more in found.items():
                        values.setdefault(name, {}).setdefault(key, []).extend(more)
    if not values:
        parser.error(
            f"there is no task {arguments.only!r} here; the tasks are {DEMO}, and with shared data {RECALL}, {STORIES}"
        )
    rows, targets = [], {}
    for name, found in values.items():
        task = kinds[name]
        mine = rows_of(name, task.metric, found)
        rows += mine
        targets |= targets_of(name, task.metric, task.wanted if name == task.name else {}, mine)
    if arguments.short:
        probes = [r for r in rows if r["scorer"] == "probe"]
        beaten = [f"{r['tokens']} tokens, keep {r['keep']}" for r in probes if is_beaten(r, rows)]
        print(f"baselines win at {', '.join(beaten)}" if beaten else "the probe wins everywhere")
        sys.exit(bool(beaten))
    if arguments.only and (RESULTS / "quality.json").exists():
        before = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
        rows = [row for row in before["rows"] if row["model"] not in kinds] + rows
        old = {k: v for k, v in before["targets"].items() if not any(k.startswith(f"{name}, ") for name in kinds)}
        targets = old | targets
    write("quality", f"python bench/quality.py --seeds {seeds}", rows, targets)


def is_beaten(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a baseline answers more questions than the probe at its length and keep ratio.

    Half of a prompt is enough for most questions, so one answer more is no sign there.
    """
    others = [
        r for r in rows if (r["tokens"], r["keep"], r["scorer"] in BASELINES) == (row["tokens"], row["keep"], True)
    ]
    ahead = 1 / row["items"] if row["keep"] >= 0.5 else 0
    return any(r["exact"] > row["exact"] + ahead + 1e-9 for r in others)


if __name__ == "__main__":
    main()
