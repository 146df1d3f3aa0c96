"""Calibration files: JSON lines with prompt/answer or context/question/answer, or plain text. A bad line is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.items import Item

LARGEST_FILE = 1 << 30  # bytes
LONGEST_LINE = 1 << 20  # bytes
FIELDS = (("context", "question", "answer"), ("prompt", "answer"))
EXPECTED = " or ".join("/".join(fields) for fields in FIELDS)
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Example:
    """Text of one item; ``answer`` is None where the model's own continuation is to be the label."""

    prompt: str
    answer: str | None


def read(path: Path) -> list[Example]:
    """All examples of a file. Raises CalibrationDataError naming file and line.

    JSON lines where the first line starts with '{' or the file's name says so; else each line is a plain text.
    """
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise CalibrationDataError(f"calibration file {path} {found}; check the path")
    examples: list[Example] = []
    is_json = path.suffix.lower() in JSON_SUFFIXES
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CalibrationDataError(
                f"calibration file {path} has {size} bytes; at most {LARGEST_FILE} are read, use a sample"
            )
        for number, text in _lines(path):
            is_json = is_json or (not examples and text.startswith("{"))
            examples.append(_json_line(path, number, text) if is_json else Example(text, None))
    except OSError as error:
        raise CalibrationDataError(f"calibration file {path} cannot be read: {error}; check its permissions") from error
    if not examples:
        raise CalibrationDataError(
            f"calibration file {path} is empty; expected JSON lines with {EXPECTED}, or lines of plain text"
        )
    return examples


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank; no more of a line is read than is allowed."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise CalibrationDataError(
                    f"{path}, line {number}: more than {LONGEST_LINE} bytes; shorten the line or split it up"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise CalibrationDataError(
                    f"{path}, line {number}: not UTF-8 text ({error}); save the file as UTF-8"
                ) from error
            if text:
                yield number, text


def _json_line(path: Path, number: int, text: str) -> Example:
    place = f"{path}, line {number}"
    try:
        row: Any = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of too many digits
        raise CalibrationDataError(f"{place}: not JSON ({error}); expected an object with {EXPECTED}") from error
    if not isinstance(row, dict):
        raise CalibrationDataError(f"{place}: found {type(row).__name__}, expected one object a line, with {EXPECTED}")
    for fields in FIELDS:
        if all(field in row for field in fields):
            bad = next((f for f in fields if not _is_text(row[f])), None)
            if bad is not None:
                raise CalibrationDataError(f"{place}: '{bad}' must be text that is not empty, found {row[bad]!a:.80}")
            return Example(" ".join(row[f].strip() for f in fields[:-1]), row["answer"].strip())
    raise CalibrationDataError(f"{place}: found fields {sorted(row)!a:.200}, expected {EXPECTED}")


def _is_text(value: object) -> bool:
    """Whether a tokenizer can take it: not blank, and no lone surrogate, which JSON can spell."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def encode(tokenizer: Any, example: Example) -> Item:
    """Token ids of one example; the answer's tokens are those that follow the prompt's in ``prompt + " " + answer``.

    The prompt is encoded as the runtime does, with the tokenizer's special tokens; the answer has none of them.
    Raises CalibrationDataError for an answer without tokens.
    """
    prompt = tuple(tokenizer.encode(example.prompt))
    if example.answer is None:
        return Item(prompt, ())
    alone = tokenizer.encode(example.prompt, add_special_tokens=False)
    both = tokenizer.encode(f"{example.prompt} {example.answer}", add_special_tokens=False)
    answer = both[len(alone) :]
    if both[: len(alone)] != alone or not answer:  # prompt and answer share a token
        answer = tokenizer.encode(example.answer, add_special_tokens=False)
    if not answer:
        raise CalibrationDataError(
            f"the answer {example.answer!a:.80} has no tokens in this model's vocabulary; change it or leave it out"
        )
    return Item(prompt, tuple(answer))
