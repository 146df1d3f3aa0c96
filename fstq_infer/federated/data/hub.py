"""Data sets of the Hugging Face hub, or folders that ``datasets`` can load. Knows their columns, not their files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fstq_infer.errors import DataError
from fstq_infer.federated.data.rows import Bad, Row, row
from fstq_infer.lazy import load

PROMPTS = ("prompt", "question", "instruction", "input")
CONTEXTS, ANSWERS = ("context", "passage"), ("answer", "answers", "output", "response", "completion", "long_answer")
GROUPS = ("group", "language", "lang", "source", "category", "subject")
ID = re.compile(r"(?P<id>[^:#]+)(:(?P<name>[^#]+))?(#(?P<split>.+))?")


def hub(path: str) -> Iterator[Row | Bad]:
    """The rows of ``ID[:CONFIGURATION][#SPLIT]``, split ``train`` unless one is named.

    Columns are found by name: the first of PROMPTS (after a context, where there is one), of ANSWERS and of GROUPS.
    """
    found = ID.fullmatch(path)
    if found is None:
        raise DataError(f"{path!a} is no id of a data set, expected OWNER/NAME, OWNER/NAME:CONFIGURATION#SPLIT")
    fetch = load("datasets:load_dataset", f"reading {path} from the hub", "federated")
    try:
        rows = fetch(found["id"], found["name"], split=found["split"] or "train")
    except Exception as error:  # whatever the library or the connection raises
        raise DataError(f"data set {path} cannot be loaded: {error}. Check id, split and connection.") from error
    columns = tuple(rows.column_names)
    prompt, answer = _first(columns, PROMPTS), _first(columns, ANSWERS)
    if prompt is None or answer is None:
        raise DataError(
            f"data set {path} has columns {', '.join(columns[:12])}, expected a prompt ({', '.join(PROMPTS)}) and an "
            f"answer ({', '.join(ANSWERS)}). Convert it to JSON lines."
        )
    context, group = _first(columns, CONTEXTS), _first(columns, GROUPS)
    for number, item in enumerate(rows):
        yield _row(f"row {number}", item, prompt, answer, context, group)


def _row(
    where: str, item: Mapping[str, Any], prompt: str, answer: str, context: str | None, group: str | None
) -> Row | Bad:
    asked, said = item[prompt], _text(item[answer])
    before = item[context] if context else None
    if isinstance(before, str) and isinstance(asked, str):
        asked = f"{before} {asked}"
    return row(where, asked, said, "" if group is None else str(item[group]))


def _text(value: Any) -> Any:
    """A text, or the first one of SQuAD's ``{"text": [...]}`` or of a list."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, list):
        return value[0] if value else ""
    return value


def _first(columns: tuple[str, ...], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in columns), None)
