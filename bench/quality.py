"""Exact match of pruned answers, probe against published scorers, on unseen questions and over several seeds.

python bench/quality.py --seeds 5      hours on 2 cores; writes results/quality.json
python bench/quality.py --short        minutes: one seed, few items, the demo model; exits with 1 where a baseline wins

The probe's rows are greedy text of the exported ONNX Runtime engine. Baselines prune in torch, at the same layer and
with the same forced tokens, on the same questions (they read what a graph that prunes there does not have).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, SHARED, target, write
from fstq_export import data, source
from fstq_export.calibrate import Recipe
from fstq_export.command import bars
from fstq_export.demo import facts
from fstq_export.demo.run import MODEL, is_exact, room
from fstq_export.demo.train import amounts
from fstq_export.pipeline import Request, export
from fstq_export.reference import reference

from fstq_infer import Generator
from fstq_infer.fisher.gates import observe
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.scores import BASELINES, SCORES, computable
from fstq_infer.fisher.select import keep_count, select

KEEPS = (0.5, 0.25, 0.125)
DEMO, RECALL = "demo model", "stories260k-recall"
WEAK = {"recency": 0.5, "snapkv": 0.15}  # what these answer of the recall questions at keep 50 %, at most


@dataclass(frozen=True, slots=True)
class Task:
    """A model, calibration data, and test questions by prompt length. wanted: least exact match over dense, by keep."""

    name: str
    model: Path
    layer: int
    calibration: Path
    tests: dict[int, Path]
    wanted: dict[float, float]


def questions(path: Path, split: str, lengths: Sequence[int], count: int, seed: int) -> Path:
    """Generated questions over contexts of about those lengths in tokens, as a file."""
    rng = random.Random(seed)
    items = [facts.item(rng, split, *amounts(lengths[i % len(lengths)])) for i in range(count)]
    rows = [{"context": i.context, "question": i.question, "answer": i.answer} for i in items]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tasks(folder: Path, seed: int, short: bool) -> list[Task]:
    """What is measured; for each seed other draws of the same generators."""
    lengths = (256,) if short else (512, 1000)
    calibration = (128, 256) if short else (256, 512, 1000)
    count, asked = (300, 60) if short else (900, 200)
    demo = Task(
        DEMO,
        MODEL,
        2,
        questions(folder / "demo.jsonl", "valid", calibration, count, 1000 + seed),
        {n: questions(folder / f"demo-{n}.jsonl", "test", (n,), asked, 2000 + seed) for n in lengths},
        {0.5: 0.995, 0.25: 0.99, 0.125: 0.96},
    )
    recall, items = SHARED / "models" / RECALL, SHARED / "data" / "recall"
    if short or not recall.exists():
        return [demo]
    return [Task(RECALL, recall, 2, items / "calib.jsonl", {150: items / "val.jsonl"}, {0.5: 0.98, 0.25: 0.85}), demo]


def engine_hits(generator: Generator, examples: Sequence[data.Example], keep: float) -> list[bool]:
    """Whether each answer is exact."""
    hits = []
    for example in examples:
        wanted = str(example.answer)
        result = generator.generate(example.prompt, keep=keep, max_tokens=room(generator, wanted))
        hits.append(is_exact(result, wanted))
    return hits


def baseline_hits(task: Task, examples: Sequence[data.Example], recipe: Recipe) -> dict[tuple[str, float], list[bool]]:
    """Whether each answer is exact, for every published scorer and keep ratio."""
    found = source.resolve(str(task.model), None)
    tokens = source.tokenizer(found)
    items = [data.encode(tokens, example) for example in examples]
    out = {}
    with reference(found, stream=False) as decoder:
        seen = observe(decoder, items, (task.layer,), recipe.window, published=True)
        evidence = [o.evidence(task.layer, seed=recipe.seed * 1_000_003 + i) for i, o in enumerate(seen)]
        for name in computable(BASELINES, evidence[0]):
            scores = [SCORES[name](e) for e in evidence]
            for keep in KEEPS:

                def choose(indices: Sequence[int], keep: float = keep, scores: Any = scores) -> list[Any]:
                    sink, window = recipe.sink, recipe.window
                    counts = {i: keep_count(len(scores[i]), keep, sink, window) for i in indices}
                    return [select(scores[i], counts[i], sink, window) for i in indices]

                out[name, keep] = pruned_outcome(decoder, items, task.layer, choose)[0].tolist()
    return out


def interval(hits: Sequence[bool]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap interval over items."""
    values = np.array(hits, float)
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    return float(values.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def measure(task: Task, seed: int, folder: Path) -> dict[tuple[int, str, float], list[bool]]:
    """(length, scorer, keep) -> hits; the scorer "dense" has keep 1."""
    recipe = Recipe(prune_layer=task.layer, keep=0.25, seed=seed)
    with bars() as progress:
        done = export(Request(str(task.model), folder / "bundle", recipe, task.calibration, overwrite=True), progress)
    generator = Generator.load(done.path)
    out = {}
    for length, file in task.tests.items():
        examples = data.read(file)
        out[length, "dense", 1.0] = engine_hits(generator, examples, 1.0)
        for keep in KEEPS:
            out[length, "probe", keep] = engine_hits(generator, examples, keep)
        for (name, keep), hits in baseline_hits(task, examples, recipe).items():
            out[length, name, keep] = hits
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", help="a task's name")
    arguments = parser.parse_args()
    seeds = 1 if arguments.short else arguments.seeds
    hits: dict[tuple[str, int, str, float], list[bool]] = {}
    wanted: dict[str, dict[float, float]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(prefix="fstq-bench-") as scratch:
            for task in tasks(Path(scratch), seed, arguments.short):
                if arguments.only in (None, task.name):
                    wanted[task.name] = task.wanted
                    for (length, scorer, keep), found in measure(task, seed, Path(scratch)).items():
                        hits.setdefault((task.name, length, scorer, keep), []).extend(found)
    rows, targets = [], {}
    for (name, length, scorer, keep), found in hits.items():
        mean, low, high = interval(found)
        dense = float(np.mean(hits[name, length, "dense", 1.0]))
        rows.append(
            {"model": name, "tokens": length, "scorer": scorer, "keep": keep, "exact": mean, "low": low, "high": high}
            | {"dense": dense, "items": len(found)}
        )
        if scorer == "probe":
            alike = [h for (m, n, s, k), h in hits.items() if (m, n, k) == (name, length, keep) and s != scorer]
            best = max(float(np.mean(h)) for h in alike)
            if keep in wanted[name]:
                label = f"{name}, {length} tokens, keep {keep:.1%}: exact match over dense"
                targets[label] = target(mean / max(dense, 1e-9), wanted[name][keep])
            if keep <= 0.25:
                damage = (dense - mean) / max(dense - best, 1e-9)
                label = f"{name}, {length} tokens, keep {keep:.1%}: damage over the best baseline's"
                targets[label] = target(damage, 0.6, at_least=False)
        if name == RECALL and keep == 0.5 and scorer in WEAK:
            targets[f"{name}, {scorer} at keep 50 %"] = target(mean, WEAK[scorer], at_least=False)
    if arguments.short:
        lost = [f"{r['tokens']} tokens, keep {r['keep']}" for r in rows if r["scorer"] == "probe" and beaten(r, rows)]
        print(f"baselines win at {', '.join(lost)}" if lost else "the probe wins everywhere")
        sys.exit(bool(lost))
    if arguments.only and (RESULTS / "quality.json").exists():
        before = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
        rows = [row for row in before["rows"] if row["model"] != arguments.only] + rows
        targets = {k: v for k, v in before["targets"].items() if not k.startswith(arguments.only)} | targets
    write("quality", f"python bench/quality.py --seeds {seeds}", rows, targets)


def beaten(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a baseline answers more questions than the probe at its length and keep ratio."""
    others = [r for r in rows if (r["tokens"], r["keep"]) == (row["tokens"], row["keep"])]
    return any(r["exact"] > row["exact"] for r in others)


if __name__ == "__main__":
    main()
