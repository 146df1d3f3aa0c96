"""Data sets of a federation: rows of (prompt, answer, group), read by kind, and how they are shared among clients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fstq_infer.errors import OptionError, suggestion

Row = tuple[str, str, str]  # prompt, answer, group
KINDS = ("jsonl",)
WAYS = ("iid", "natural")


@dataclass
class Rows:
    """Iterates over the rows of a file; ``skipped`` counts lines that hold none, and is right after an iteration."""

    path: Path
    skipped: int = 0

    def __iter__(self) -> Iterator[Row]:
        self.skipped = 0
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                try:
                    item = json.loads(line)
                    yield str(item["prompt"]), str(item["answer"]), str(item.get("group", ""))
                except (ValueError, KeyError, TypeError):
                    self.skipped += 1


def read(kind: str, path: str | Path) -> Rows:
    """Rows of a file. Raises OptionError for an unknown kind or no file."""
    if kind not in KINDS:
        raise OptionError(f"there is no data kind {kind!a}; {suggestion(kind, KINDS)}")
    if not Path(path).is_file():
        raise OptionError(f"there is no file {path}")
    return Rows(Path(path))


def partition(rows: Sequence[Row], clients: int, how: str, seed: int) -> list[list[int]]:
    """Indices of the rows of each client: ``iid``, or ``natural`` (groups stay whole)."""
    if how == "iid":
        order = np.random.default_rng(seed).permutation(len(rows))
        return [sorted(part.tolist()) for part in np.array_split(order, clients)]
    if how == "natural":
        groups = {name: place for place, name in enumerate(sorted({group for _, _, group in rows}))}
        parts: list[list[int]] = [[] for _ in range(clients)]
        for index, (_, _, group) in enumerate(rows):
            parts[groups[group] % clients].append(index)
        return parts
    raise OptionError(f"there is no way {how!a} to share rows; {suggestion(how, WAYS)}")
