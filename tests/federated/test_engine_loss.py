"""Real model, real questions: the loss of held-out rows through the engine, before and after, equals the trainer's."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="a federation needs the 'federated' extra")
pytest.importorskip("flwr_datasets", reason="dividing rows needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")
pytest.importorskip("peft", reason="training needs the 'federated' extra")
pytest.importorskip("mobius", reason="an engine needs the 'export' extra")

from fstq_export.adapters import Wanted
from fstq_export.pipeline import Request, export
from safetensors.numpy import load_file

from fstq_infer import Generator
from fstq_infer.federated.app.config import from_flower
from fstq_infer.federated.app.simulate import simulate
from fstq_infer.federated.app.site import Site
from fstq_infer.federated.data import read
from fstq_infer.federated.train import Example

SHARED = Path(os.environ.get("FSTQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MODEL, DATA = SHARED / "models" / "stories260k", SHARED / "data" / "medquad" / "medquad_train.jsonl.gz"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.is_dir() and DATA.is_file()), reason=f"no model or data under {SHARED}"),
]
PER_SOURCE, SOURCES, HELD = 24, 3, 6


def write_rows(folder: Path) -> None:
    """Rows of the first sources, one file for each client."""
    import json

    found: dict[str, list[str]] = {}
    for row in read("medquad", DATA):
        rows = found.setdefault(row.group, [])
        if len(rows) < PER_SOURCE:
            rows.append(json.dumps({"prompt": row.prompt[:100], "answer": " ".join(row.answer.split())[:160]}) + "\n")
    whole = [rows for rows in found.values() if len(rows) == PER_SOURCE][:SOURCES]
    for client, rows in enumerate(whole):
        (folder / f"rows-{client}.jsonl").write_text("".join(rows), encoding="utf-8")


def loss_through(engine: Any, examples: list[Example]) -> float:
    """Mean negative log-likelihood per labelled token, one token a call."""
    total, count = 0.0, 0
    none = np.zeros((1, 0), np.int64)
    for example in examples:
        cache = engine.empty_cache(1)
        for place, (token, label) in enumerate(pairwise(example.tokens)):
            step = engine.forward(np.array([[token]], np.int64), np.array([[place]], np.int64), none, cache)
            cache, logits = step.cache, step.logits[0].astype(np.float64)
            total += float(np.logaddexp.reduce(logits) - logits[label])
            count += 1
    return total / count


def test_the_engine_has_the_trainers_held_out_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path)
    config = from_flower(
        {
            "model.path": str(MODEL), "data.path": str(tmp_path / "rows-{client}.jsonl"), "data.partition": "own",
            "data.learn": "all", "data.max_tokens": 96, "data.holdout": 0.2, "train.steps": 8, "train.batch": 8,
            "train.learning_rate": 1e-2, "messages.bytes": 8192, "server.rounds": 2, "simulation.clients": SOURCES,
            "output.folder": str(tmp_path / "out"), "client.memory": str(tmp_path / "memory"),
        }
    )  # fmt: skip
    simulate(config)
    adapter = tmp_path / "out/adapter"
    site = Site(config)
    trainer = site.trainer()
    texts = site._texts_of_model()
    held = texts.examples(list(read("medquad", DATA))[-HELD:])
    before = trainer.loss(held)
    trainer.load(load_file(adapter / "adapter_model.safetensors"))
    after = trainer.loss(held)
    assert after < before - 0.05
    export(Request(str(MODEL), tmp_path / "bundle", adapters=Wanted({"medical": adapter})))
    generator = Generator.load(tmp_path / "bundle")
    assert abs(loss_through(generator.engine, held) - before) < 1e-3
    generator.set_adapter("medical")
    assert abs(loss_through(generator.adapted_engine, held) - after) < 1e-3
