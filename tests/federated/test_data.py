"""Readers and partitioners: hand-made files of every kind, bad rows by count, damage, and division among clients."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.errors import DataError
from fstq_infer.federated.data import KINDS, Row, hub, partition, read, readers

SHARED = Path(os.environ.get("FSTQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Ana  lives in Rome.",
                    "qas": [
                        {"question": "Where does Ana live?", "answers": [{"text": "Rome"}, {"text": "in Rome"}]},
                        {"question": "Who lives in Oslo?", "answers": []},
                        {"question": 7, "answers": [{"text": "x"}]},
                    ],
                },
                {"context": None, "qas": [{"question": "Q", "answers": [{"text": "A"}]}]},
                "no paragraph",
            ]
        }
    ]
}
MEDQUAD = [
    {"source": "A", "question": "What is X ?", "answer": "X is\n  y."},
    {"source": "B", "question": "What is Z ?", "answer": "  "},
    {"source": "B", "question": "What is V ?", "answer": "V is w."},
    {"source": None, "question": "What is V ?", "answer": "V is w."},
]
ITEM = {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "It does.", "final_decision": "yes"}
PUBMEDQA = {"1": ITEM, "2": ITEM | {"final_decision": "often"}, "3": ITEM | {"CONTEXTS": [1]}, "4": []}
JSONL = [
    {"prompt": "p", "answer": "a", "group": "g"},
    {"context": "c", "question": "q", "answer": "a"},
    {"question": "q", "answer": "a"},
    {"prompt": "p"},
    {"context": 3, "question": "q", "answer": "a"},
]


def lines(items: list[Any]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


FILES: dict[str, tuple[bytes, list[Row], int]] = {
    "squad": (json.dumps(SQUAD).encode(), [Row("Ana lives in Rome. Where does Ana live?", "Rome", "rows")], 3),
    "medquad": (lines(MEDQUAD), [Row("What is X ?", "X is y.", "A"), Row("What is V ?", "V is w.", "B")], 2),
    "pubmedqa": (json.dumps(PUBMEDQA).encode(), [Row("One. Two. Does it?", "yes. It does.", "yes")], 3),
    "jsonl": (lines(JSONL) + b"\n{bad\n[1]\n", [Row("p", "a", "g"), Row("c q", "a"), Row("q", "a")], 4),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_rows_of_each_kind(kind: str, packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, expected, skipped = FILES[kind]
    path = tmp_path / ("rows.json.gz" if packed else "rows.json")
    path.write_bytes(gzip.compress(content) if packed else content)
    rows = read(kind, path)
    assert list(rows) == expected and rows.skipped == skipped == sum(rows.reasons.values())
    assert f"{skipped} rows skipped" in caplog.text


def test_every_kind_of_file_is_tried_here() -> None:
    assert FILES.keys() | {"hub"} == KINDS.keys()


def test_a_folder_of_squad_files_has_a_group_for_each(tmp_path: Path) -> None:
    for language in ("de", "en"):
        (tmp_path / f"xquad.{language}.json").write_text(json.dumps(SQUAD))
    assert [row.group for row in read("squad", tmp_path)] == ["xquad.de", "xquad.en"]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[]", b"[" * 100_000, b"\x1f\x8bnothing", b"{}"])
def test_what_is_no_data_set_is_an_error_that_names_the_file(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.json"):
        read(kind, path)


@pytest.mark.parametrize(
    ("kind", "path"), [("squat", "x"), ("squad", "."), ("hub", ""), ("hub", "a#"), ("jsonl", "no")]
)
def test_wrong_names(kind: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read(kind, tmp_path / path if kind != "hub" else path)


def test_a_packed_file_cut_off_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines([{"prompt": "p", "answer": str(n)} for n in range(1000)]))[:-500])
    with pytest.raises(DataError, match="damaged"):
        read("jsonl", path)


@pytest.mark.parametrize("kind", ["jsonl", "squad"])
def test_a_packed_file_with_other_bytes_is_damaged(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json.gz"
    content = gzip.compress(lines([{"prompt": "p", "answer": str(n)} for n in range(1000)]))
    path.write_bytes(content[:10] + b"\xff" * 200 + content[210:])  # no block of deflate begins so
    with pytest.raises(DataError, match=r"rows\.json\.gz is (damaged|no JSON file)"):
        read(kind, path)


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"prompt": ' + "1" * 5000 + "}", "\udcff"])
def test_a_line_that_does_not_parse_is_a_skipped_row(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = lines([{"prompt": "p", "answer": "a"}]).strip()
    path.write_bytes(good + b"\n" + bad.encode(errors="surrogateescape") + b"\n" + good + b"\n")
    assert len(read("jsonl", path).rows) == 2


def test_sizes_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"prompt": "p" * 200, "answer": "a"}]))
    monkeypatch.setattr(readers, "MOST_LINE", 100)
    with pytest.raises(DataError, match="more than 100 bytes"):
        read("jsonl", path)
    monkeypatch.setattr(readers, "MOST_BYTES", 100)
    with pytest.raises(DataError, match="more than 100 bytes"):
        read("squad", path)


NAMES = [
    "data",
    "paragraphs",
    "qas",
    "context",
    "question",
    "answers",
    "text",
    "prompt",
    "answer",
    "source",
    "CONTEXTS",
]
LEAVES = st.none() | st.text(max_size=3) | st.integers()


def nested(inner: Any) -> Any:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, nested, max_leaves=20))
def test_any_json_gives_rows_or_a_data_error(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(content))
        for kind in FILES:
            try:
                found = read(kind, path)
            except DataError:
                continue
            assert all(row.prompt and row.answer for row in found)


def table(groups: dict[str, int]) -> list[Row]:
    return [Row("p", "a", name) for name, count in groups.items() for _ in range(count)]


ROWS = table({"a": 40, "b": 25, "c": 10, "d": 5})


@pytest.mark.parametrize("clients", [1, 3, 4, 7, 20])
@pytest.mark.parametrize("how", ["iid", "natural", "dirichlet", "dirichlet:5"])
def test_each_row_has_one_client_and_each_client_a_row(how: str, clients: int) -> None:
    pytest.importorskip("flwr_datasets")
    parts = partition(ROWS, clients, how, seed=3)
    assert len(parts) == clients and all(part and part == sorted(part) for part in parts)
    assert sorted(index for part in parts for index in part) == list(range(len(ROWS)))
    assert parts == partition(ROWS, clients, how, seed=3)
    if clients > 1:
        assert how == "natural" or parts != partition(ROWS, clients, how, seed=4)


def test_natural_clients_keep_groups_whole_or_have_rows_of_one() -> None:
    pytest.importorskip("flwr_datasets")
    for clients in (2, 4, 9):
        groups = [{ROWS[index].group for index in part} for part in partition(ROWS, clients, "natural")]
        if clients >= 4:
            assert all(len(found) == 1 for found in groups)
        else:
            assert sum(len(found) for found in groups) == 4


def test_a_small_alpha_concentrates() -> None:
    pytest.importorskip("flwr_datasets")
    rows = table(dict.fromkeys("abcde", 200))

    def largest(alpha: float) -> float:
        parts = partition(rows, 5, f"dirichlet:{alpha}", seed=0)
        return sum(max(Counter(rows[i].group for i in part).values()) for part in parts) / len(rows)

    assert largest(0.05) > largest(100) + 0.3


@pytest.mark.parametrize(
    ("clients", "how"),
    [(2, "random"), (0, "iid"), (81, "iid"), (41, "dirichlet"), (2, "dirichlet:0"), (2, "dirichlet:x")],
)
def test_impossible_divisions(clients: int, how: str) -> None:
    with pytest.raises(DataError):
        partition(ROWS, clients, how)


def test_a_saved_data_set_is_read_by_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"question": "q", "context": "c", "answers": {"text": ["a"]}, "lang": "en"}] * 3))
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert next(iter(loaded))["lang"] == "en"
    row = hub._row("row 0", loaded[0], "question", "answers", "context", "lang")
    assert row == Row("c q", "a", "en")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data under {SHARED}")
def test_the_shared_data_sets() -> None:
    medquad = read("medquad", SHARED / "data/medquad/medquad_train.jsonl.gz")
    assert (len(medquad), medquad.skipped, len(medquad.groups)) == (15578, 0, 7)
    xquad = read("squad", SHARED / "data/xquad")
    assert (len(xquad), len(xquad.groups)) == (10710, 9)
    assert len(read("pubmedqa", SHARED / "data/pubmedqa/pqal_train500.json")) == 500
