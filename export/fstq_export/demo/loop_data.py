"""The files of the loop: what each client trains on, what calibration reads, what is asked before and after."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fstq_export.demo import domain, facts
from fstq_export.demo.facts import Item
from fstq_export.demo.train import amounts
from fstq_infer.atomic import replace_file
from fstq_infer.errors import OptionError

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
    """Numbers of questions: for each client, to calibrate with (known and new ones), to ask.

    mixed: share of a client's rows that are questions in languages that the model knows, so that it keeps them.
    """

    rows: int = 800
    mixed: float = 0.2
    known: int = 240
    new: int = 120
    asked: int = 60

    def __post_init__(self) -> None:
        if min(self.rows, self.known, self.new, self.asked) < 1 or not 0 <= self.mixed < 1:
            raise OptionError(
                f"rows {self.rows}, known {self.known}, new {self.new}, asked {self.asked}: expected numbers above 0; "
                f"mixed {self.mixed}: expected a share from 0 to below 1"
            )


def write(folder: Path, sizes: Sizes) -> None:
    """All files. Names of one split never occur in another: train for clients, valid to calibrate, test to ask."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, topic in enumerate(domain.TOPICS):
        lines = [
            {"prompt": f"{row.context} {row.question}", "answer": row.answer, "group": group}
            for group, row in _trained(topic, sizes)
        ]
        _write(folder / CLIENT.format(client=number), lines)
    calibration = _known("valid", sizes.known) + domain.items(random.Random("valid"), "valid", sizes.new, LONG)
    _write(folder / CALIBRATION, _asked(calibration))
    _write(folder / DOMAIN_TEST, _asked(domain.items(random.Random("test"), "test", sizes.asked, LONG)))
    _write(folder / KNOWN_TEST, _asked(_known("test", sizes.asked)))


def _trained(topic: str, sizes: Sizes) -> Iterator[tuple[str, Item]]:
    """(topic or language that is known, question) of each row of the client with that topic."""
    rng = random.Random(f"client {topic}")
    for _ in range(sizes.rows):
        known, told, fillers = rng.random() < sizes.mixed, rng.randint(*SHORT[0]), rng.randint(*SHORT[1])
        if known:
            row = facts.item(rng, "train", told, fillers)
            yield row.language, row
        else:
            yield topic, domain.item(rng, "train", topic, told, fillers)


def _known(split: str, count: int) -> list[Item]:
    rng = random.Random(f"known {split}")
    return [facts.item(rng, split, *amounts(rng.randint(*KNOWN_TOKENS))) for _ in range(count)]


def _asked(items: Iterable[Item]) -> list[dict[str, str]]:
    return [{"context": x.context, "question": x.question, "answer": x.answer} for x in items]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
