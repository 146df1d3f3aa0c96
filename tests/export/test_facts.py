"""fstq_export.demo.facts: questions whose answers follow from their contexts, in splits that share no name."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import combinations

import pytest
from fstq_export.demo import facts
from fstq_export.demo.facts import KINDS, LANGUAGES, SPLITS, Item, Language, World, split_of

from fstq_infer.errors import OptionError

NAME = re.compile(r"^(?:[bdfgklmnprstvz][aeiou]){2,3}(?:n|l|r|s|x|th|nd|k|m)$")
COUNT = 250


def items(split: str, seed: int = 0, count: int = COUNT) -> list[Item]:
    rng = random.Random(seed)
    return [facts.item(rng, split, rng.randint(3, 25), rng.randint(0, 10)) for _ in range(count)]


def worlds(count: int = 60) -> list[World]:
    rng = random.Random(5)
    return [World(rng, LANGUAGES[rng.choice(list(LANGUAGES))], "train", rng.randint(2, 40)) for _ in range(count)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def names(item: Item) -> set[str]:
    """Made-up names in an item, lower case; a few real words look like one."""
    language = LANGUAGES[item.language]
    own = {w.lower() for values in language.words.values() for v in values for w in words(v)}
    own |= {w.lower() for text in (*language.filler, language.frame) for w in words(text)}
    own |= {w.lower() for r in language.relations for text in (*r.says, r.asks) for w in words(text)}
    return {w.lower() for w in words(f"{item.context} {item.question}") if NAME.match(w.lower())} - own


def stated(item: Item) -> set[tuple[str, str, str]]:
    """(relation, subject, value) of every sentence of the context, read back by the wording alone."""
    language = LANGUAGES[item.language]
    found = set()
    for sentence in re.findall(r"[^.]+\.", item.context):
        sentence = sentence.strip()
        if sentence not in language.filler:
            found.add(parse(language, sentence))
    return found


def parse(language: Language, sentence: str) -> tuple[str, str, str]:
    for relation in language.relations:
        for wording in relation.says:
            pattern = re.escape(wording).replace(r"\{s\}", r"(?P<s>[^:,.]+)").replace(r"\{v\}", r"(?P<v>[^:,.]+)")
            match = re.fullmatch(pattern, sentence)
            if match and plausible(language, relation.values, match["v"]):
                return relation.name, match["s"], match["v"]
    raise AssertionError(f"no relation says {sentence!r}")


def plausible(language: Language, kind: str, value: str) -> bool:
    if kind in language.words:
        return value in language.words[kind]
    pattern = {"dose": r"\d+ mg", "code": r"\d{4}", "thing": r"\w+ \w+"}.get(kind, NAME.pattern[1:-1])
    return re.fullmatch(pattern, value if kind == "thing" else value.lower()) is not None


# ---- splits ------------------------------------------------------------------------------------------------------


def test_splits_share_no_name() -> None:
    found = {split: set().union(*map(names, items(split))) for split in SPLITS}
    assert all(len(found[split]) > 200 for split in SPLITS)
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]
    for split in SPLITS:
        assert {split_of(name) for name in found[split]} == {split}


def test_training_documents_and_narratives_use_training_names_only() -> None:
    rng = random.Random(2)
    for _ in range(40):
        context, asked = facts.document(rng, 8, 3, 4)
        for world in (context, facts.narrative(rng, 5)):
            found = {w for w in words(world) if w[0].isupper() and NAME.match(w.lower())}
            assert {split_of(w.lower()) for w in found} <= {"train"} or found & {"Motor", "Radio"}
        assert len(asked) == 4


def test_most_names_are_for_training() -> None:
    rng = random.Random(1)
    drawn = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(4000)]
    share = Counter(map(split_of, drawn))
    assert share["train"] / 4000 == pytest.approx(0.8, abs=0.03)
    assert share["valid"] / 4000 == pytest.approx(0.1, abs=0.02)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(OptionError, match="train, valid, test"):
        facts.item(random.Random(0), "dev", 3, 0)


# ---- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_context(split: str) -> None:
    for item in items(split):
        language, known = LANGUAGES[item.language], stated(item)
        assert item.answer.endswith(".")
        answer = item.answer[:-1]
        assert derive(language, known, item) == answer, item
        if item.kind != "absent":
            assert answer in item.context


def derive(language: Language, known: set[tuple[str, str, str]], item: Item) -> str:
    """The one answer that the stated facts give to the question."""
    answers = set()
    for relation in language.relations:
        mine = [(s, v) for name, s, v in known if name == relation.name]
        answers |= {v for s, v in mine if asked(language, relation.asks.format(s=s)) == item.question}
        which = language.which.get(relation.name)
        if which:
            answers |= {s for s, v in mine if asked(language, which.format(v=v)) == item.question}
    rivers = {s: v for name, s, v in known if name == "river"}
    for name, subject, value in known:
        linked = asked(language, language.linked["river"].format(s=subject))
        if name == "lives" and value in rivers and linked == item.question:
            answers.add(rivers[value])
    assert len(answers) <= 1, (answers, item)
    return answers.pop() if answers else language.absent


def asked(language: Language, question: str) -> str:
    return language.frame.format(q=question)


@pytest.mark.parametrize("split", SPLITS)
def test_absent_subjects_are_nowhere_in_the_context(split: str) -> None:
    absent = [item for item in items(split, seed=1, count=600) if item.kind == "absent"]
    assert len(absent) > 50
    for item in absent:
        language = LANGUAGES[item.language]
        assert item.answer == f"{language.absent}."
        subjects = [w for w in words(item.question) if split_of(w.lower()) == split and NAME.match(w.lower())]
        assert subjects and not {subjects[-1]} & set(words(item.context))


def test_absent_subjects_are_drawn_again_when_they_are_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few names as there are facts, chance alone would ask for a stated subject."""
    pool = ["Bab", "Dad", "Faf", "Gag", "Kak", "Lal", "Mam"]
    monkeypatch.setattr(facts, "made_up_name", lambda rng, _split: rng.choice(pool))
    for seed in range(200):
        world = World(random.Random(seed), LANGUAGES["en"], "train", 3)
        question, _, kind = world.question("absent")
        named = {w for fact in world.facts for w in words(f"{fact.subject} {fact.value}")}
        assert kind == "absent" and not set(words(question)) & set(pool) & named


def test_no_two_facts_contradict() -> None:
    for world in worlds():
        subjects = Counter((fact.relation.name, fact.subject) for fact in world.facts)
        values = Counter((fact.relation.name, fact.value) for fact in world.facts)
        assert max(subjects.values()) == 1 and max(values.values()) == 1


def test_a_world_has_as_many_facts_as_asked_for() -> None:
    rng = random.Random(0)
    for count in (1, 2, 10, 60):  # 60: more than there are rooms, jobs and illnesses
        assert len(World(rng, LANGUAGES["de"], "test", count).facts) in (count, count + 1)


def test_every_fact_and_filler_is_told() -> None:
    for world in worlds(20):
        text = world.text(4)
        found = stated(Item(text, "", "", "", world.language.code))
        assert found == {(fact.relation.name, fact.subject, fact.value) for fact in world.facts}
        assert len(re.findall(r"\.", text)) == len(world.facts) + 4


# ---- variety and seeds -------------------------------------------------------------------------------------------


def test_every_language_kind_relation_and_wording_occurs() -> None:
    drawn = items("train", count=400)
    assert {(item.language, item.kind) for item in drawn} == {(code, kind) for code in LANGUAGES for kind in KINDS}
    for code, language in LANGUAGES.items():
        mine = [item for item in drawn if item.language == code]
        told = " ".join(item.context for item in mine)
        for relation in language.relations:
            assert any(name == relation.name for item in mine[:60] for name, _, _ in stated(item))
            for wording in relation.says:
                assert re.search(re.sub(r"\\\{[sv]\\\}", "[^.]+", re.escape(wording)), told)
        assert all(filler in told for filler in language.filler)


def test_a_language_can_be_chosen() -> None:
    for code in LANGUAGES:
        assert {facts.item(random.Random(s), "test", 4, 1, code).language for s in range(10)} == {code}


def test_seeds_reproduce() -> None:
    assert items("valid", seed=3, count=30) == items("valid", seed=3, count=30)
    assert items("valid", seed=3, count=30) != items("valid", seed=4, count=30)
    for draw in (lambda rng: facts.document(rng, 6, 2, 3), lambda rng: facts.narrative(rng, 4)):
        assert draw(random.Random(9)) == draw(random.Random(9)) != draw(random.Random(10))


def test_narratives_tell_the_same_facts_again() -> None:
    for seed in range(20):
        text = facts.narrative(random.Random(seed), 4)
        code = next(c for c, x in LANGUAGES.items() if all(tells(x, s) for s in re.findall(r"[^.]+\.", text)))
        sentences = [s.strip() for s in re.findall(r"[^.]+\.", text)]
        told = Counter(parse(LANGUAGES[code], s) for s in sentences if s not in LANGUAGES[code].filler)
        assert set(told.values()) == {4}


def tells(language: Language, sentence: str) -> bool:
    if sentence.strip() in language.filler:
        return True
    try:
        parse(language, sentence.strip())
    except AssertionError:
        return False
    return True
