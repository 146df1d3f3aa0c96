"""Clients and held-out rows of bench/federated.py's tasks, as token rows of one length."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from common import SHARED, shared
from tokenizers import Tokenizer

from fstq_infer.federated.data import Row, Rows, partition, read

LENGTH = 65  # tokens of a row: 64 to predict
PER_GROUP, HELD = 400, 126  # training rows of a group for 20 clients at most; held-out rows of all groups together
LEAST = 8  # rows of a client; smaller ones are left out, where there are 20 clients


@dataclass(frozen=True)
class Task:
    """clients: (n, LENGTH) tokens each. held_out: rows of all groups in equal shares; no client has them."""

    clients: list[torch.Tensor]
    held_out: torch.Tensor


def load(name: str, clients: int, seed: int) -> Task:
    """``medquad``: by source, Dirichlet 0.1. ``xquad``: by language, natural. The held-out rows do not depend on the
    seed. XQuAD is parallel: what is held out in one language may be seen in another."""
    tokenizer = Tokenizer.from_file(str(SHARED / "models/stories260k/tokenizer.json"))
    rows, how = (_medquad(), "dirichlet:0.1") if name == "medquad" else (_xquad(), "natural")
    by_group: dict[str, list[tuple[Row, list[int]]]] = defaultdict(list)
    for index in np.random.default_rng(0).permutation(len(rows)).tolist():
        row = rows[index]
        tokens = tokenizer.encode(f"Question: {row.prompt} Answer: {row.answer}"[:1200]).ids[:LENGTH]
        if len(tokens) == LENGTH:
            by_group[row.group].append((row, tokens))
    held, kept = list[list[int]](), list[tuple[Row, list[int]]]()
    for _, found in sorted(by_group.items()):
        share = HELD // len(by_group)
        held += [tokens for _, tokens in found[:share]]
        kept += found[share : share + PER_GROUP * max(clients // 20, 1)]
    parts = partition([row for row, _ in kept], clients, how, seed)
    tokens = torch.tensor([tokens for _, tokens in kept])
    least = LEAST if clients <= 20 else 1
    return Task([tokens[part] for part in parts if len(part) >= least], torch.tensor(held))


def _medquad() -> Rows:
    return read("medquad", shared("data/medquad/medquad_train.jsonl.gz"))


def _xquad() -> list[Row]:
    """Question first, then answer and context: the start of a row is what counts."""
    rows = read("squad", shared("data/xquad"))
    return [Row(row.prompt[-160:], row.answer + " " + row.prompt[:400], row.group) for row in rows]
