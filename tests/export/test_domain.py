"""fstq_export.demo.domain and loop_data: facts of a domain the demo model does not know, in splits without overlap."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from fstq_export.demo import domain, facts, loop_data
from fstq_export.demo.loop_data import LONG, SHORT, Sizes
from hypothesis import given
from hypothesis import strategies as st

from fstq_infer.errors import OptionError

NAME = re.compile(
    r"\b[BDFGKLMNPRSTVZ](?:al|ap|en|eb|ir|ig|or|od|un|uf)[bdfgklmnprstvz](?:as|az|ek|el|im|iv|os|on|ut|ur)\b"
)


@given(
    st.integers(0, 2**32), st.sampled_from(facts.SPLITS), st.sampled_from(sorted(domain.TOPICS)),
    st.integers(1, 16), st.integers(0, 6), st.sampled_from(sorted(domain.LANGUAGES)),
)  # fmt: skip
def test_the_answer_is_said_once_of_the_subject(
    seed: int, split: str, topic: str, count: int, fillers: int, code: str
) -> None:
    """Among the wordings of the relation asked for, one sentence names the subject, and it holds the answer."""
    found = domain.item(random.Random(seed), split, topic, count, fillers, code)
    language = domain.LANGUAGES[code]
    matches = [
        (relation, subject)
        for relation in language.relations
        for subject in set(NAME.findall(found.context))
        if language.frame.format(q=relation.asks.format(s=subject)) == found.question
    ]
    assert len(matches) == 1
    relation, subject = matches[0]
    assert relation.name in domain.TOPICS[topic]
    value = found.answer.removesuffix(".")
    said = [says.format(s=subject, v=value) for says in relation.says]
    assert sum(found.context.count(sentence) for sentence in said) == 1
    assert {facts.split_of(name.lower()) for name in NAME.findall(found.context)} == {split}


def test_relations_are_new_and_each_has_a_topic() -> None:
    known = {relation.name for language in facts.LANGUAGES.values() for relation in language.relations}
    topics = [name for names in domain.TOPICS.values() for name in names]
    assert len(topics) == len(set(topics)) and not known & set(topics)
    for language in domain.LANGUAGES.values():
        assert {relation.name for relation in language.relations} == set(topics)
        for relation in language.relations:
            for wording in (*relation.says, relation.asks):
                assert "{s}" in wording and ("{v}" in wording) == (wording != relation.asks)
            values = language.words.get(relation.values, ())
            assert relation.values in ("name", "code") or len(set(values)) == len(values) >= 12
        questions = {relation.asks for relation in language.relations}
        assert len(questions) == len(language.relations)
    assert "it" in domain.LANGUAGES and "it" not in facts.LANGUAGES
    assert {code: language.frame for code, language in domain.LANGUAGES.items()}["it"] not in {
        language.frame for language in facts.LANGUAGES.values()
    }


def test_topics_and_languages_in_turn() -> None:
    found = domain.items(random.Random(0), "test", 60, LONG)
    assert {(item.kind, item.language) for item in found} == {(t, c) for t in domain.TOPICS for c in domain.LANGUAGES}


@pytest.mark.parametrize(("topic", "code", "said"), [("harbor", "en", "harbour"), ("farm", "fi", "en, it")])
def test_unknown_names_are_refused(topic: str, code: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        domain.item(random.Random(0), "test", topic, 3, 1, code)


def test_files(tmp_path: Path) -> None:
    loop_data.write(tmp_path, Sizes(rows=30, known=8, new=6, asked=12))
    names: dict[str, set[str]] = {}
    for number, topic in enumerate(domain.TOPICS):
        rows = [json.loads(line) for line in (tmp_path / f"client-{number}.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == 30 and {row["group"] for row in rows} <= {topic, *facts.LANGUAGES}
        assert 0 < sum(row["group"] != topic for row in rows) < 15
        assert all(row["prompt"].rstrip().endswith(":") and row["answer"] for row in rows)
        names.setdefault("train", set()).update(name for row in rows for name in NAME.findall(row["prompt"]))
    for split, file, count in (("valid", loop_data.CALIBRATION, 14), ("test", loop_data.DOMAIN_TEST, 12)):
        text = (tmp_path / file).read_text("utf-8")
        assert len(text.splitlines()) == count
        names[split] = set(NAME.findall(text))
    assert all(names.values())
    assert (
        not names["train"] & names["valid"]
        and not names["train"] & names["test"]
        and not names["valid"] & names["test"]
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loop_data.write(tmp_path, Sizes(rows=30, known=8, new=6, asked=12))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert SHORT[0][1] <= LONG[0][0]


def test_without_known_questions_a_client_has_its_topic_alone(tmp_path: Path) -> None:
    loop_data.write(tmp_path, Sizes(rows=30, mixed=0.0, known=1, new=1, asked=1))
    rows = [json.loads(line) for line in (tmp_path / "client-0.jsonl").read_text("utf-8").splitlines()]
    assert {row["group"] for row in rows} == {"harbour"}


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"asked": -1}, {"mixed": 1.0}, {"mixed": -0.1}])
def test_sizes_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="expected"):
        Sizes(**wrong)  # type: ignore[arg-type]
