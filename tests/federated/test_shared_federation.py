"""A real pretrained model and real questions, divided by source among clients: compressed messages and dense ones."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="a federation needs the 'federated' extra")
pytest.importorskip("constriction", reason="a federation needs the 'federated' extra")
pytest.importorskip("torch", reason="a federation needs the 'federated' extra")
pytest.importorskip("transformers", reason="a federation needs the 'federated' extra")
pytest.importorskip("peft", reason="a federation needs the 'federated' extra")

import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from transformers import AutoModelForCausalLM, AutoTokenizer

from fstq_infer.federated.budget import SameBudget
from fstq_infer.federated.client import client_app
from fstq_infer.federated.local import LocalGrid
from fstq_infer.federated.mod import FstqMod
from fstq_infer.federated.server import Rounds, federate
from fstq_infer.federated.strategy import FstqStrategy
from fstq_infer.federated.train import Example, LoraTrainer, TrainSettings

SHARED = Path(os.environ.get("FSTQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MODEL, DATA = SHARED / "models" / "stories260k", SHARED / "data" / "medquad" / "medquad_train.jsonl.gz"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.is_dir() and DATA.is_file()), reason=f"no model or data under {SHARED}"),
]
CLIENTS, PER_CLIENT, ROUNDS = 4, 64, 5


def sources() -> list[list[Example]]:
    """Examples of the first sources that have enough of them, one list for each."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found: dict[str, list[Example]] = {}
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            rows = found.setdefault(item["source"], [])
            if len(rows) < PER_CLIENT:
                tokens = tuple(tokenizer.encode(f"Question: {item['question']} Answer: {item['answer']}"[:300])[:128])
                rows.append(Example(tokens, tokens))
    return [rows for rows in found.values() if len(rows) == PER_CLIENT][:CLIENTS]


def run(folder: Path, preset: str, budget: int) -> tuple[list[float], int]:
    """(loss after each round on all clients' data, bytes of all messages)."""
    torch.manual_seed(0)
    trainer = LoraTrainer(AutoModelForCausalLM.from_pretrained(MODEL))
    rows = sources()
    app = client_app(
        lambda _: trainer,
        lambda context: rows[context.node_config["partition-id"]],
        TrainSettings(steps=6, learning_rate=2e-3),
        [FstqMod(trainer.identity, folder, preset)],
        preset,
    )
    start = ArrayRecord({name: Array(values) for name, values in trainer.arrays().items()})
    strategy = FstqStrategy(FedAvg(), trainer.identity, SameBudget(budget))
    result: Any = federate(strategy, LocalGrid(app, len(rows)), start, Rounds(ROUNDS))
    assert strategy.refused.total() == 0
    sent = sum(int(metrics["fstq-bytes"]) for metrics in result.train_metrics_clientapp.values())
    return [metrics["loss"] for metrics in result.evaluate_metrics_clientapp.values()], sent


def test_compressed_messages_learn(tmp_path: Path) -> None:
    dense, much = run(tmp_path / "dense", "lossless", 0)
    ours, little = run(tmp_path / "fstq", "fstq", 4000)
    assert much > 30 * little
    assert all(after < before for before, after in pairwise(ours))
    assert ours[-1] < dense[0] and dense[-1] < ours[-1] < dense[-1] + 1.0
