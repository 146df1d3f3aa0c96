"""Is the quality contract honest? Random recipes; what each bundle claims against what fresh items show.

python bench/contract.py                  about an hour on 2 cores; writes results/contract.json
python bench/contract.py --partial DIR    keeps what each recipe showed in DIR, and goes on from there

Calibrations run as ``fstq export`` runs them, without writing the graph: what a bundle claims is decided there. A
recipe draws model, data, number of items, prompt lengths, prune layer and seed; the allowed drop is 1 %.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import SHARED, target, write
from fstq_export import data, source
from fstq_export.calibrate import Calibrator
from fstq_export.contract import Outcome, drop, split
from fstq_export.demo.run import MODEL
from fstq_export.recipe import Recipe
from fstq_export.reference import reference
from quality_tasks import RECALL, questions

from fstq_infer.atomic import replace_file
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.select import mass_count, select
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import keep_counts

RECIPES, FRESH, ALLOWED, SHOWN = 20, 1000, 0.01, 0.015


def drawn(rng: random.Random, folder: Path) -> tuple[str, Path, list[data.Example], list[data.Example], Recipe]:
    """(name, model, calibration items, fresh items, recipe)."""
    seed = rng.randrange(2**31)
    recipe = Recipe(prune_layer=rng.choice((None, 2, 3)), max_quality_drop=ALLOWED, seed=seed)
    recall = SHARED / "models" / RECALL
    if recall.exists() and rng.random() < 0.3:
        pool = data.read(SHARED / "data" / "recall" / "calib.jsonl")
        pool += data.read(SHARED / "data" / "recall" / "val.jsonl")
        rng.shuffle(pool)
        return RECALL, recall, pool[FRESH:], pool[:FRESH], recipe
    lengths = rng.choice(((100, 200), (150, 300), (100, 250, 400)))
    count = rng.choice((900, 1200, 1600))
    calibration = data.read(questions(folder / "calibration.jsonl", "valid", lengths, count, seed))
    fresh = data.read(questions(folder / "fresh.jsonl", "test", lengths, FRESH, seed + 1))
    return "demo model", MODEL, calibration, fresh, recipe


def fresh_drops(decoder: Decoder, calibrator: Calibrator, result: Any, items: list[Item]) -> dict[str, float]:
    """What the calibrated probe loses on fresh items, for what it claims: at a keep ratio, and adaptively."""
    sink, window = calibrator.recipe.sink, calibrator.window
    stages = [Stage(layer, sink, window) for layer in result.layers]
    spans: list[int] = []
    for probe in result.probes:
        spans.append(spans[-1] if probe is None else probe.span_size)

    def outcome(count: Callable[[int, int, Any], int]) -> Outcome:
        """count: (stage, tokens of the prompt, scores) -> how many stay."""

        def choose(stage: int, item: int, tokens: Any, scores: Any) -> Any:
            return tokens[select(scores, count(stage, len(items[item].prompt), scores), sink, window)]

        found = pruned_outcome(decoder, items, result.layers, choose, result.probes)
        return Outcome(found.exact.astype(np.float64), found.nll)

    def adaptive(stage: int, size: int, scores: Any) -> int:
        auto = result.auto
        return len(scores) if size <= auto.floor else mass_count(scores, auto.mass, sink, window, spans[stage])

    claimed: dict[str, Callable[[int, int, Any], int]] = {}
    if result.met and result.keeps[-1] < 1:
        claimed["fresh_drop"] = lambda stage, size, _scores: keep_counts(size, result.keeps, stages)[stage]
    if result.auto is not None:
        claimed["fresh_drop_adaptive"] = adaptive
    dense = outcome(lambda _stage, size, _scores: size)
    return {name: drop(dense, outcome(count), dense.metric) for name, count in claimed.items()}


def measure(rng: random.Random) -> dict[str, Any]:
    """A recipe, what its bundle would claim, and what fresh items show."""
    with tempfile.TemporaryDirectory(prefix="fstq-bench-") as scratch:
        name, model, examples, fresh, recipe = drawn(rng, Path(scratch))
    found = source.resolve(str(model), None)
    tokens = source.tokenizer(found)
    with reference(found, stream=False) as decoder:
        parts = split([data.encode(tokens, e) for e in examples], recipe.seed)
        calibrator = Calibrator(decoder, parts, recipe, lambda *_: None)
        result = calibrator.run()
        row: dict[str, Any] = {"model": name, "items": len(examples), "prune_layer": recipe.prune_layer}
        row |= {"layer": result.layers[0], "keep": result.keep, "claimed_drop": result.drop, "seed": recipe.seed}
        row["mass"] = None if result.auto is None else result.auto.mass
        return row | fresh_drops(decoder, calibrator, result, [data.encode(tokens, e) for e in fresh])


def remembered(seed: int, number: int, partial: Path | None) -> dict[str, Any]:
    """:func:`measure` of a seed's recipe, or what it found before and left in ``partial``."""
    path = None if partial is None else partial / f"recipe-{seed}-{number}.json"
    if path is not None and path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    row = measure(random.Random(f"{seed}-{number}"))
    if path is not None:
        replace_file(path, json.dumps(row).encode())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--partial", type=Path, help="folder of what has been measured so far")
    arguments = parser.parse_args()
    rows = []
    for number in range(arguments.recipes):
        rows.append(remembered(arguments.seed, number, arguments.partial))
        print(f"{number + 1} of {arguments.recipes}: {rows[-1]}", flush=True)
    write(
        "contract",
        f"python bench/contract.py --recipes {arguments.recipes} --seed {arguments.seed}",
        rows,
        {
            f"{name}: share of {len(shown)} claims of at most 1 % that show at most 1.5 % on fresh items": target(
                sum(found <= SHOWN for found in shown) / len(shown), 0.95
            )
            for name in ("fresh_drop", "fresh_drop_adaptive")
            if (shown := [row[name] for row in rows if name in row])
        },
    )


if __name__ == "__main__":
    main()
