"""Calibration files: JSON lines with prompt/answer or context/question/answer, or plain text. A bad line is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.items import Item

LARGEST_FILE = 1 << 30
LONGEST_LINE = 1 << 20
FIELDS = (("context", "question", "answer"), ("prompt", "answer"))


@dataclass(frozen=True, slots=True)
class Example:
    """Text of one item; ``answer`` is None where the model's own continuation is to be the label."""

    prompt: str
    answer: str | None


def read(path: Path) -> list[Example]:
    """All examples of a file. Raises CalibrationDataError naming file and line."""
    if not path.is_file():
        raise CalibrationDataError(f"calibration file {path} does not exist")
    if path.stat().st_size > LARGEST_FILE:
        raise CalibrationDataError(
            f"calibration file {path} has {path.stat().st_size} bytes; at most {LARGEST_FILE} are read, use a sample"
        )
    examples: list[Example] = []
    try:
        with path.open(encoding="utf-8") as lines:
            first = ""
            for number, line in enumerate(lines, 1):
                if len(line) > LONGEST_LINE:
                    raise CalibrationDataError(
                        f"{path}, line {number}: {len(line)} characters; at most {LONGEST_LINE} are allowed"
                    )
                text = line.strip()
                if not text:
                    continue
                first = first or text
                examples.append(_json_line(path, number, text) if first.startswith("{") else Example(text, None))
    except UnicodeDecodeError as error:
        raise CalibrationDataError(f"calibration file {path} is not UTF-8 text ({error})") from error
    if not examples:
        raise CalibrationDataError(
            f"calibration file {path} is empty; expected JSON lines with {_expected()}, or lines of plain text"
        )
    return examples


def _expected() -> str:
    return " or ".join("/".join(fields) for fields in FIELDS)


def _json_line(path: Path, number: int, text: str) -> Example:
    try:
        row: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationDataError(
            f"{path}, line {number}: not JSON ({error}); expected an object with {_expected()}"
        ) from error
    if not isinstance(row, dict):
        raise CalibrationDataError(
            f"{path}, line {number}: found {type(row).__name__}, expected an object with {_expected()}"
        )
    for fields in FIELDS:
        if all(field in row for field in fields):
            bad = next((f for f in fields if not isinstance(row[f], str) or not row[f].strip()), None)
            if bad is not None:
                raise CalibrationDataError(
                    f"{path}, line {number}: '{bad}' must be text that is not empty, found {row[bad]!r:.80}"
                )
            return Example(" ".join(row[f].strip() for f in fields[:-1]), row["answer"].strip())
    raise CalibrationDataError(f"{path}, line {number}: found fields {sorted(row)}, expected {_expected()}")


def encode(tokenizer: Any, example: Example) -> Item:
    """Token ids of one example; the answer's tokens are those that follow the prompt's in ``prompt + " " + answer``."""
    prompt = tokenizer.encode(example.prompt)
    if example.answer is None:
        return Item(tuple(prompt), ())
    both = tokenizer.encode(f"{example.prompt} {example.answer}")
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return Item(tuple(prompt), tuple(both[len(prompt) :]))
    return Item(tuple(prompt), tuple(tokenizer.encode(example.answer, add_special_tokens=False)))
