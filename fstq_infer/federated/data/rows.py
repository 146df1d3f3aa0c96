"""What a reader gives: rows, and how many could not be used and why. Knows no file format."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fstq_infer.errors import DataError

log = logging.getLogger(__name__)
MOST_CHARACTERS = 1 << 20  # of one text; a longer one is not a question or an answer
SHOWN = 3


class Row(NamedTuple):
    """prompt: what the model sees; answer: what it is to say; group: where the row comes from, for natural clients."""

    prompt: str
    answer: str
    group: str = ""


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used. where: names the row in its file."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in the order of the file; ``reasons`` counts those left out."""

    rows: tuple[Row, ...]
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, found: Iterable[Row | Bad], source: str) -> Rows:
        """Collect what a reader yields. Raises DataError where no row is left."""
        good, reasons, first = list[Row](), Counter[str](), list[str]()
        for item in found:
            bad = item if isinstance(item, Bad) else None
            if bad is None:
                good.append(item)  # type: ignore[arg-type]
                continue
            reasons[bad.reason] += 1
            if len(first) < SHOWN:
                first.append(f"{bad.where}: {bad.reason}")
        if reasons:
            log.warning("%s: %d rows skipped, %d used; %s", source, reasons.total(), len(good), "; ".join(first))
        if not good:
            why = f" {'; '.join(first)}." if first else " It holds none."
            raise DataError(f"{source} has no row that can be used.{why} Check its kind: see docs/federated.md.")
        return cls(tuple(good), reasons)

    @property
    def skipped(self) -> int:
        """Rows that were left out."""
        return self.reasons.total()

    @property
    def groups(self) -> list[str]:
        """The groups there are, in order of their first row."""
        return list(dict.fromkeys(row.group for row in self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def row(where: str, prompt: Any, answer: Any, group: Any = "") -> Row | Bad:
    """A row of two texts, with white space joined to single spaces; or why it is none."""
    for name, text in (("prompt", prompt), ("answer", answer), ("group", group)):
        if not isinstance(text, str):
            return Bad(where, f"no text for the {name}")
        if len(text) > MOST_CHARACTERS:
            return Bad(where, f"a {name} of more than {MOST_CHARACTERS} characters")
    prompt, answer = " ".join(prompt.split()), " ".join(answer.split())
    if not answer:
        return Bad(where, "an empty answer")
    if not prompt:
        return Bad(where, "an empty prompt")
    return Row(prompt, answer, group)
