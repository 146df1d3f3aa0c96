"""Readers of data sets by kind: files to rows. A bad row is skipped and counted; a file of another kind is an error."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fstq_infer.errors import DataError, suggestion
from fstq_infer.federated.data.hub import hub
from fstq_infer.federated.data.rows import Bad, Row, Rows, row

MOST_BYTES, MOST_LINE = 1 << 30, 1 << 24  # of a file, unpacked; of one line
Found = Iterator[Row | Bad]
Item = dict[str, Any]


def read(kind: str, path: str | Path) -> Rows:
    """The rows of a data set.

    kind: a row of :data:`KINDS`. path: a file; a folder for kind ``squad``, whose files are the groups; the id of a
    data set for kind ``hub``, ``OWNER/NAME[:CONFIGURATION][#SPLIT]``. Files may be gzipped. Raises DataError for what
    cannot be read, and where no row can be used.
    """
    if kind not in KINDS:
        raise DataError(f"there is no data set of kind {kind!a}; {suggestion(kind, KINDS)}")
    return Rows.of(KINDS[kind](str(path)), str(path))


def squad(path: str) -> Found:
    """SQuAD's format (XQuAD's too): paragraphs with questions. The group is the file's name: XQuAD's language.

    Unanswerable questions of SQuAD 2 are skipped as rows with an empty answer.
    """
    place = Path(path)
    files = sorted(place.glob("*.json*")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"{path} holds no .json file. Name a file in SQuAD's format, or a folder of such files.")
    for file in files:
        yield from _squad_file(file)


def _squad_file(path: Path) -> Found:
    document = _document(path)
    articles = document.get("data") if isinstance(document, dict) else None
    if not isinstance(articles, list):
        raise DataError(f"{path} has no list 'data', which SQuAD's format has. Check the file, or its kind.")
    group = path.name.split(".json")[0]
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_list(article, "paragraphs")):
            for q, asked in enumerate(_list(paragraph, "qas")):
                where = f"{path.name} article {a} paragraph {p} question {q}"
                context, question = _get(paragraph, "context"), _get(asked, "question")
                if not isinstance(context, str) or not isinstance(question, str):
                    yield Bad(where, "no text for context or question")
                    continue
                answers = _list(asked, "answers")
                yield row(where, f"{context} {question}", _get(answers[0], "text") if answers else "", group)


def medquad(path: str) -> Found:
    """MedQuAD as JSON lines; the group is the source, an institute's web site."""
    for where, item in _lines(path):
        yield item if isinstance(item, Bad) else row(where, *(item.get(k) for k in ("question", "answer", "source")))


def pubmedqa(path: str) -> Found:
    """PubMedQA: abstract and question, then yes, no or maybe with the long answer. The group is the decision."""
    document = _document(Path(path))
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}, expected PubMedQA's object of items by id.")
    for where, item in document.items():
        contexts, decision = _list(item, "CONTEXTS"), _get(item, "final_decision")
        question, answer = _get(item, "QUESTION"), _get(item, "LONG_ANSWER")
        if not all(isinstance(text, str) for text in (*contexts, question, answer)):
            yield Bad(where, "no text for a context, the question or the answer")
        elif decision not in ("yes", "no", "maybe"):
            yield Bad(where, "a decision other than yes, no or maybe")
        else:
            yield row(where, " ".join([*contexts, question]), f"{decision}. {answer}", decision)


def jsonl(path: str) -> Found:
    """JSON lines with ``prompt`` (or ``context`` and ``question``), ``answer``, and ``group`` where there is one."""
    for where, item in _lines(path):
        if isinstance(item, Bad):
            yield item
            continue
        prompt = item.get("prompt")
        if prompt is None and isinstance(item.get("question"), str):
            context = item.get("context", "")
            prompt = f"{context} {item['question']}" if isinstance(context, str) else None
        yield row(where, prompt, item.get("answer"), item.get("group", ""))


KINDS: Mapping[str, Callable[[str], Found]] = {
    "squad": squad,
    "medquad": medquad,
    "pubmedqa": pubmedqa,
    "jsonl": jsonl,
    "hub": hub,
}


def _opened(path: Path) -> Any:
    try:
        file = path.open("rb")
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    return gzip.GzipFile(fileobj=file) if packed else file


def _document(path: Path) -> Any:
    """A whole JSON file."""
    with _opened(path) as file:
        try:
            content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise DataError(f"{path} has more than {MOST_BYTES} bytes; split it.")
            return json.loads(content)
        except DataError:
            raise
        except (OSError, EOFError, zlib.error, RecursionError, ValueError) as error:
            raise DataError(f"{path} is no JSON file: {error}. Check the file, or its kind.") from error


def _lines(path: str) -> Iterator[tuple[str, Item | Bad]]:
    """(name of the line, object) of each line that is not empty."""
    total = 0
    with _opened(Path(path)) as opened, io.BufferedReader(opened) as file:
        for number in range(1, MOST_BYTES):
            where = f"line {number}"
            try:
                line = file.readline(MOST_LINE + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} is damaged after line {number - 1}: {error}. Fetch it again.") from error
            total += len(line)
            if len(line) > MOST_LINE or total > MOST_BYTES:
                raise DataError(f"{path} {where}: more than {MOST_LINE} bytes, or {MOST_BYTES} in all; split it.")
            if not line:
                return
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (RecursionError, ValueError):  # ValueError: damage, or a number of too many digits
                yield where, Bad(where, "no JSON")
                continue
            yield where, item if isinstance(item, dict) else Bad(where, "no JSON object")


def _get(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else None


def _list(item: Any, name: str) -> list[Any]:
    found = _get(item, name)
    return found if isinstance(found, list) else []
