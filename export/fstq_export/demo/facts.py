"""Seeded generator of long-context questions in four languages: the demo model's training and test data.

Knows how facts, filler and questions are put together (their wording is in languages.json); knows nothing of tokens
or models. Every name is made of two parts, and a hash of the name decides its split, so that test names never occur
in training.
"""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fstq_infer.errors import OptionError

SPLITS = ("train", "valid", "test")
KINDS = ("single", "single", "both", "which", "choice", "linked", "absent")
TRAINING_KINDS = ("single", "single", "both", "both", "which", "which", "choice", "choice", "linked", "absent")

_CONSONANTS = "bdfgklmnprstvz"
_HEAD_ENDS = ("al", "ap", "en", "eb", "ir", "ig", "or", "od", "un", "uf")
_TAIL_ENDS = ("as", "az", "ek", "el", "im", "iv", "os", "on", "ut", "ur")
_HEADS = [a + b for a in _CONSONANTS for b in _HEAD_ENDS]
_TAILS = [a + b for a in _CONSONANTS for b in _TAIL_ENDS]
# The second part of a made-up name.
NAME_TAIL = rf"(?<=\b[A-Z](?:{'|'.join(_HEAD_ENDS)}))[{_CONSONANTS}](?:{'|'.join(_TAIL_ENDS)})\b"


@dataclass(frozen=True, slots=True)
class Item:
    """One question over one context; the prompt is ``context + " " + question`` and the answer follows with a space."""

    context: str
    question: str
    answer: str
    kind: str
    language: str


@dataclass(frozen=True, slots=True)
class Relation:
    """How one relation is stated and asked in one language; ``{s}`` is the subject, ``{v}`` the value.

    A statement names the subject, the value and, where there are questions for the subject, the subject again: a model
    this small finds what follows the words of a question, but does not learn to find what comes before them.
    """

    name: str
    values: str
    says: tuple[str, ...]
    asks: str


@dataclass(frozen=True, slots=True)
class Language:
    """All wording of one language."""

    code: str
    relations: tuple[Relation, ...]
    which: dict[str, str]
    choice: dict[str, str]
    linked: dict[str, str]
    absent: str
    frame: str
    filler: dict[str, Any]
    words: dict[str, Any]


def language_of(code: str, wording: dict[str, Any]) -> Language:
    """A language from its wording, as in languages.json."""
    relations = tuple(
        Relation(name, row["values"], tuple(row["says"]), row["asks"]) for name, row in wording.pop("relations").items()
    )
    return Language(code=code, relations=relations, **wording)


LANGUAGES = {
    code: language_of(code, wording)
    for code, wording in json.loads((resources.files(__package__) / "languages.json").read_text("utf-8")).items()
}


def split_of(name: str) -> str:
    """The split a made-up name belongs to: 80 % train, 10 % valid, 10 % test, by hash of the name."""
    bucket = zlib.crc32(name.encode()) % 10
    return "train" if bucket < 8 else "valid" if bucket == 8 else "test"


def made_up_name(rng: random.Random, split: str) -> str:
    """A capitalised name of two parts that belongs to ``split``; OptionError for an unknown split."""
    if split not in SPLITS:
        raise OptionError(f"split is '{split}'; expected one of {', '.join(SPLITS)}")
    while True:
        name = rng.choice(_HEADS) + rng.choice(_TAILS)
        if split_of(name) == split:
            return name.capitalize()


@dataclass(frozen=True, slots=True)
class Fact:
    """One stated fact."""

    relation: Relation
    subject: str
    value: str

    def say(self, rng: random.Random) -> str:
        """The fact as a sentence, in one of its wordings."""
        return rng.choice(self.relation.says).format(s=self.subject, v=self.value)


class World:
    """A set of facts about made-up subjects in one language; within a relation no subject and no value occurs twice.

    facts: how many; one more where the last one brings a town and who lives there. relations: of these
    only, so that more facts differ in their names and values alone; where all their values are taken, others come in.
    """

    def __init__(
        self,
        rng: random.Random,
        language: Language,
        split: str,
        facts: int,
        relations: Sequence[Relation] = (),
    ) -> None:
        self.rng, self.language, self.split = rng, language, split
        self.facts: list[Fact] = []
        self._taken: set[tuple[str, str]] = set()
        for attempt in itertools.count():
            if len(self.facts) >= facts:
                break
            relation = rng.choice(relations if relations and attempt < 4 * facts else language.relations)
            if relation.name == "river":
                self._add_town(relation)
            else:
                self._add(relation, self._subject(relation), self._value(relation.values))
        rng.shuffle(self.facts)

    def _add(self, relation: Relation, subject: str, value: str) -> None:
        if not {(relation.name, subject), (relation.name, "=" + value)} & self._taken:
            self._taken |= {(relation.name, subject), (relation.name, "=" + value)}
            self.facts.append(Fact(relation, subject, value))

    def _add_town(self, river: Relation) -> None:
        """A town on a river and, beside it, somebody who lives there: together they answer a linked question."""
        town = made_up_name(self.rng, self.split)
        lives = next(r for r in self.language.relations if r.name == "lives")
        self._add(river, town, self._value("name"))
        self._add(lives, made_up_name(self.rng, self.split), town)

    def _subject(self, relation: Relation) -> str:
        if relation.name in ("room", "code"):
            return f"{self.rng.choice(self.language.words['device'])} {made_up_name(self.rng, self.split)}"
        return made_up_name(self.rng, self.split)

    def _value(self, kind: str) -> str:
        words, rng = self.language.words, self.rng
        if kind == "name":
            return made_up_name(rng, self.split)
        if kind == "dose":
            return f"{rng.randrange(5, 100) * 10} mg"
        if kind == "code":
            return str(rng.randrange(1000, 10000))
        if kind == "thing":
            thing: str = words["thing"].format(colour=rng.choice(words["colour"]), object=rng.choice(words["object"]))
            return thing
        word: str = rng.choice(words[kind])
        return word

    def text(self, fillers: int) -> str:
        """The facts in order, with ``fillers`` filler sentences strewn in between."""
        sentences = [fact.say(self.rng) for fact in self.facts]
        for _ in range(fillers):
            sentences.insert(self.rng.randrange(len(sentences) + 1), self._filler())
        return " ".join(sentences)

    def _filler(self) -> str:
        parts = self.language.filler
        verb, _, rest = self.rng.choice(parts["does"]).partition(" ")
        time, who = self.rng.choice(parts["time"]), self.rng.choice(parts["who"])
        sentence: str = parts["order"].format(time=time, who=who, verb=verb, rest=rest)
        return sentence

    def questions(self, count: int, kinds: Sequence[str] = KINDS) -> list[tuple[str, str, str]]:
        """At most ``count`` (question, answer, kind), the kind drawn from ``kinds``.

        No fact is asked about twice, so that no answer can be copied from an earlier question; only the river behind
        a linked question may also be asked for by its town. A kind that no fact left over fits becomes "single".
        """
        left = list(self.facts)
        asked: list[tuple[str, str, str]] = []
        while left and len(asked) < count:
            kind = wanted = self.rng.choice(kinds)
            fact = self.rng.choice([f for f in left if self._fits(f, kind)] or left)
            question, answer, kind = self._ask(fact, kind)
            if kind != "absent":
                left.remove(fact)
            if kind == "single" and wanted == "both" and left:
                second = left.pop(self.rng.randrange(len(left)))
                kind, question = "both", f"{question} {second.relation.asks.format(s=second.subject)}"
                answer = f"{answer}, {second.value}"
            asked.append((self.language.frame.format(q=question), answer + ".", kind))
        return asked

    def _fits(self, fact: Fact, kind: str) -> bool:
        if kind == "choice":
            return fact.relation.name in self.language.choice and self._other(fact) is not None
        if kind == "linked":
            return self._river(fact) is not None
        return kind != "which" or fact.relation.name in self.language.which

    def _ask(self, fact: Fact, kind: str) -> tuple[str, str, str]:
        name, language = fact.relation.name, self.language
        if kind == "absent":
            return self._absent(fact.relation), language.absent, kind
        if kind == "both" or not self._fits(fact, kind):
            kind = "single"
        if kind == "which":
            return language.which[name].format(v=fact.value), fact.subject, kind
        if kind == "choice":
            a, b = self.rng.sample((fact.subject, str(self._other(fact))), 2)
            return language.choice[name].format(a=a, b=b, v=fact.value), fact.subject, kind
        if kind == "linked":
            return language.linked["river"].format(s=fact.subject), str(self._river(fact)), kind
        return fact.relation.asks.format(s=fact.subject), fact.value, "single"

    def _other(self, fact: Fact) -> str | None:
        others = [f.subject for f in self.facts if f.relation == fact.relation and f != fact]
        return self.rng.choice(others) if others else None

    def _river(self, fact: Fact) -> str | None:
        """The river of the town that ``fact`` says its subject lives in."""
        if fact.relation.name != "lives":
            return None
        return next((f.value for f in self.facts if f.relation.name == "river" and f.subject == fact.value), None)

    def _absent(self, relation: Relation) -> str:
        """A question like ``relation``'s whose subject no fact names."""
        named = {word for fact in self.facts for word in f"{fact.subject} {fact.value}".split()}
        subject = self._subject(relation)
        while subject.split()[-1] in named:
            subject = self._subject(relation)
        return relation.asks.format(s=subject)


def item(rng: random.Random, split: str, facts: int, fillers: int, language: str | None = None) -> Item:
    """One random question over a context of ``facts`` facts and ``fillers`` filler sentences."""
    chosen = LANGUAGES[language or rng.choice(list(LANGUAGES))]
    world = World(rng, chosen, split, facts)
    context = world.text(fillers)
    question, answer, kind = world.questions(1)[0]
    return Item(context, question, answer, kind, chosen.code)


def document(rng: random.Random, facts: int, fillers: int, questions: int) -> tuple[str, list[tuple[str, str]]]:
    """A training document: (context, [(question, answer), ...]).

    Every other one is about few relations, of those that more than single facts are asked about: it is by their many
    facts alike that a model learns to tell them apart.
    """
    language = LANGUAGES[rng.choice(list(LANGUAGES))]
    asked = [r for r in language.relations if r.name in language.which or r.name in language.linked]
    few = rng.sample(asked, rng.randint(1, 3)) if rng.random() < 0.5 else ()
    world = World(rng, language, "train", facts, few)
    context = world.text(fillers)
    return context, [asked[:2] for asked in world.questions(questions, TRAINING_KINDS)]


def narrative(rng: random.Random, facts: int) -> str:
    """Varied, repetitive text: the same facts told again and again in changing order and wording."""
    world = World(rng, LANGUAGES[rng.choice(list(LANGUAGES))], "train", facts)
    told = [world.text(rng.randrange(3))]
    for _ in range(3):
        rng.shuffle(world.facts)
        told.append(world.text(rng.randrange(3)))
    return " ".join(told)
