"""Recall questions through the exported engine: exact match of greedy answers, beside baselines (measured in torch).

python bench/recall.py      about 4 minutes on 2 cores; writes results/recall.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import shared, target, write
from fstq_export import data
from fstq_export.calibrate import Recipe
from fstq_export.command import bars
from fstq_export.pipeline import Request, export

from fstq_infer import Generator

KEEPS = (1.0, 0.5, 0.25)


def main() -> None:
    model, items = shared("models/stories260k-recall"), shared("data/recall")
    with tempfile.TemporaryDirectory(prefix="fstq-bench-") as scratch:
        with bars() as progress:
            done = export(Request(str(model), Path(scratch) / "b", Recipe(keep=0.5), items / "calib.jsonl"), progress)
        generator = Generator.load(done.path)
        examples = data.read(items / "val.jsonl")
        exact = {keep: 0 for keep in KEEPS}
        for example in examples:
            for keep in KEEPS:
                result = generator.generate(example.prompt, keep=keep, max_tokens=16)
                exact[keep] += result.text.strip().startswith(str(example.answer))
    calibration = done.report["calibration"]
    rows = [
        {"name": f"engine, keep {keep}", "exact": hits / len(examples), "items": len(examples)}
        for keep, hits in exact.items()
    ]
    rows += [
        {"name": f"{name}, keep {row['keep']}, held-out part of calib.jsonl", "exact": row["exact"]}
        for name, curve in calibration["curves"].items()
        for row in curve
    ]
    rows.append(
        {
            "name": "export",
            "chosen": calibration["chosen"],
            "met": calibration["met"],
            "seconds": done.seconds,
            "peak_rss": done.peak_rss,
            "steps": calibration["seconds"],
        }
    )
    at_half = {
        name: next(r["exact"] for r in curve if r["keep"] == 0.5) for name, curve in calibration["curves"].items()
    }
    write(
        "recall",
        "python bench/recall.py",
        rows,
        {
            "keep 50 % exact match over dense": target(exact[0.5] / exact[1.0], 0.9),
            "recency at 50 %": target(at_half["recency"], 0.5, at_least=False),
            "pooled window attention at 50 %": target(at_half["window"], 0.15, at_least=False),
        },
    )


if __name__ == "__main__":
    main()
