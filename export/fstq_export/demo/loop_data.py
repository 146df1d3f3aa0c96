"""The files of the loop: what each client trains on, what calibration reads, what is asked before and after."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fstq_export.demo import domain, facts
from fstq_export.demo.facts import Item
from fstq_export.demo.train import amounts
from fstq_infer.atomic import replace_file

CALIBRATION, DOMAIN_TEST, KNOWN_TEST, CLIENT = (
    "calibration.jsonl",
    "domain.jsonl",
    "known.jsonl",
    "client-{client}.jsonl",
)
SHORT, LONG = ((2, 4), (0, 2)), ((4, 8), (4, 12))  # facts and filler sentences to train on, to be asked about
KNOWN_TOKENS = (120, 320)  # of contexts in the languages that the model knows


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of questions: for each client, to calibrate with (known and new ones), to ask."""

    rows: int = 800
    known: int = 240
    new: int = 120
    asked: int = 60


def write(folder: Path, sizes: Sizes) -> None:
    """All files. Names of one split never occur in another: train for clients, valid to calibrate, test to ask."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, topic in enumerate(domain.TOPICS):
        rng = random.Random(f"client {topic}")
        rows = [
            domain.item(rng, "train", topic, rng.randint(*SHORT[0]), rng.randint(*SHORT[1])) for _ in range(sizes.rows)
        ]
        lines = [
            {"prompt": f"{row.context} {row.question}", "answer": " " + row.answer, "group": topic} for row in rows
        ]
        _write(folder / CLIENT.format(client=number), lines)
    calibration = _known("valid", sizes.known) + domain.items(random.Random("valid"), "valid", sizes.new, LONG)
    _write(folder / CALIBRATION, _asked(calibration))
    _write(folder / DOMAIN_TEST, _asked(domain.items(random.Random("test"), "test", sizes.asked, LONG)))
    _write(folder / KNOWN_TEST, _asked(_known("test", sizes.asked)))


def _known(split: str, count: int) -> list[Item]:
    rng = random.Random(f"known {split}")
    return [facts.item(rng, split, *amounts(rng.randint(*KNOWN_TOKENS))) for _ in range(count)]


def _asked(items: Iterable[Item]) -> list[dict[str, str]]:
    return [{"context": x.context, "question": x.question, "answer": x.answer} for x in items]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
