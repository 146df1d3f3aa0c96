"""Seeded generator of long-context questions in two languages: the demo model's training and test data.

Knows how facts, filler and questions are worded; knows nothing of tokens or models. Every name is made of syllables,
and a hash of the name decides its split, so that test names never occur in training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from fstq_infer.errors import OptionError

SPLITS = ("train", "valid", "test")

_SYLLABLES = [
    a + b
    for a in ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"]
    for b in ["a", "e", "i", "o", "u"]
]
_ENDINGS = ["n", "l", "r", "s", "x", "th", "nd", "k", "m"]


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
    """How one relation is stated and asked in one language; ``{s}`` is the subject, ``{v}`` the value."""

    name: str
    says: tuple[str, ...]
    asks: str
    values: str


@dataclass(frozen=True, slots=True)
class Language:
    """All wording of one language."""

    code: str
    relations: tuple[Relation, ...]
    which: dict[str, str]
    linked: dict[str, str]
    absent: str
    frame: str
    filler: tuple[str, ...]
    words: dict[str, tuple[str, ...]]


ENGLISH = Language(
    code="en",
    relations=(
        Relation("lives", ("{s} lives in {v}.", "The home of {s} is {v}."), "Where does {s} live?", "place"),
        Relation("job", ("{s} works as a {v}.", "The job of {s} is {v}."), "What is the job of {s}?", "job"),
        Relation("owns", ("{s} owns a {v}.", "A {v} belongs to {s}."), "What does {s} own?", "thing"),
        Relation(
            "river", ("{s} lies on the river {v}.", "The river of {s} is {v}."), "Which river is {s} on?", "river"
        ),
        Relation("treats", ("{s} treats {v}.", "Doctors give {s} against {v}."), "What does {s} treat?", "illness"),
        Relation("dose", ("The dose of {s} is {v}.", "{s} is taken at {v}."), "What is the dose of {s}?", "dose"),
        Relation("room", ("The {s} stands in the {v}.", "In the {v} there is the {s}."), "Where is the {s}?", "room"),
        Relation(
            "code", ("The code of the {s} is {v}.", "The {s} opens with {v}."), "What is the code of the {s}?", "code"
        ),
    ),
    which={"lives": "Who lives in {v}?", "owns": "Who owns a {v}?", "treats": "Which medicine treats {v}?"},
    linked={"river": "On which river does {s} live?"},
    absent="not stated",
    frame="Question: {q} Answer:",
    filler=(
        "The wind was cold that day.",
        "It rained in the morning.",
        "Nobody spoke for a while.",
        "The road was long and quiet.",
        "Later the sun came out.",
        "They talked about the weather.",
        "A dog slept by the door.",
        "The shop opened at nine.",
        "Two birds sat on the roof.",
        "Then it was time for lunch.",
        "The train came late again.",
        "Someone closed the window.",
    ),
    words={
        "job": ("baker", "nurse", "pilot", "farmer", "singer", "painter", "teacher", "driver", "tailor", "cook"),
        "colour": ("red", "blue", "green", "black", "white", "yellow", "brown", "grey"),
        "object": ("lamp", "boat", "coat", "clock", "bike", "chair", "drum", "ring", "book", "bag"),
        "illness": (
            "fever",
            "cough",
            "headache",
            "back pain",
            "asthma",
            "rash",
            "cold",
            "toothache",
            "flu",
            "insomnia",
        ),
        "room": ("kitchen", "cellar", "garage", "office", "attic", "hall", "garden", "library", "workshop", "lobby"),
        "device": ("printer", "pump", "heater", "camera", "router", "scanner", "fridge", "sensor", "motor", "radio"),
    },
)

GERMAN = Language(
    code="de",
    relations=(
        Relation("lives", ("{s} wohnt in {v}.", "Die Heimat von {s} ist {v}."), "Wo wohnt {s}?", "place"),
        Relation("job", ("{s} arbeitet als {v}.", "Der Beruf von {s} ist {v}."), "Was ist der Beruf von {s}?", "job"),
        Relation("owns", ("{s} besitzt: {v}.", "Dies gehört {s}: {v}."), "Was besitzt {s}?", "thing"),
        Relation(
            "river", ("{s} liegt am Fluss {v}.", "Der Fluss von {s} ist {v}."), "An welchem Fluss liegt {s}?", "river"
        ),
        Relation("treats", ("{s} hilft gegen {v}.", "Ärzte geben {s} gegen {v}."), "Wogegen hilft {s}?", "illness"),
        Relation(
            "dose", ("Die Dosis von {s} ist {v}.", "Man nimmt {v} von {s}."), "Was ist die Dosis von {s}?", "dose"
        ),
        Relation("room", ("{s} steht hier: {v}.", "Hier, {v}, steht {s}."), "Wo steht {s}?", "room"),
        Relation(
            "code", ("Der Code für {s} ist {v}.", "{s} öffnet sich mit {v}."), "Was ist der Code für {s}?", "code"
        ),
    ),
    which={"lives": "Wer wohnt in {v}?", "owns": "Wer besitzt: {v}?", "treats": "Welches Mittel hilft gegen {v}?"},
    linked={"river": "An welchem Fluss wohnt {s}?"},
    absent="nicht genannt",
    frame="Frage: {q} Antwort:",
    filler=(
        "Der Wind war an dem Tag kalt.",
        "Am Morgen hat es geregnet.",
        "Eine Weile sprach niemand.",
        "Der Weg war lang und still.",
        "Später kam die Sonne heraus.",
        "Sie sprachen über das Wetter.",
        "Ein Hund schlief an der Tür.",
        "Der Laden machte um neun auf.",
        "Zwei Vögel saßen auf dem Dach.",
        "Dann war es Zeit zu essen.",
        "Der Zug kam wieder zu spät.",
        "Jemand schloss das Fenster.",
    ),
    words={
        "job": ("Bäcker", "Pfleger", "Pilot", "Bauer", "Sänger", "Maler", "Lehrer", "Fahrer", "Schneider", "Koch"),
        "colour": ("rot", "blau", "grün", "schwarz", "weiß", "gelb", "braun", "grau"),
        "object": ("Lampe", "Boot", "Mantel", "Uhr", "Rad", "Stuhl", "Trommel", "Ring", "Buch", "Tasche"),
        "illness": (
            "Fieber",
            "Husten",
            "Kopfweh",
            "Rückenweh",
            "Asthma",
            "Ausschlag",
            "Kälte",
            "Zahnweh",
            "Grippe",
            "Unruhe",
        ),
        "room": ("Küche", "Keller", "Garage", "Büro", "Dachboden", "Flur", "Garten", "Archiv", "Werkstatt", "Eingang"),
        "device": ("Drucker", "Pumpe", "Heizung", "Kamera", "Router", "Scanner", "Kühlbox", "Sensor", "Motor", "Radio"),
    },
)

LANGUAGES = {language.code: language for language in (ENGLISH, GERMAN)}


def split_of(name: str) -> str:
    """The split a made-up name belongs to: 80 % train, 10 % valid, 10 % test, by hash of the name."""
    bucket = zlib.crc32(name.encode()) % 10
    return "train" if bucket < 8 else "valid" if bucket == 8 else "test"


def made_up_name(rng: random.Random, split: str) -> str:
    """A capitalised name of two or three syllables that belongs to ``split``; OptionError for an unknown split."""
    if split not in SPLITS:
        raise OptionError(f"split is '{split}'; expected one of {', '.join(SPLITS)}")
    while True:
        name = "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3)))) + rng.choice(_ENDINGS)
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

    facts: how many; one more where the last one brings a town and who lives there.
    """

    def __init__(self, rng: random.Random, language: Language, split: str, facts: int) -> None:
        self.rng, self.language, self.split = rng, language, split
        self.facts: list[Fact] = []
        self._taken: set[tuple[str, str]] = set()
        while len(self.facts) < facts:
            relation = rng.choice(language.relations)
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
        self._add(river, town, self._value("river"))
        self._add(lives, made_up_name(self.rng, self.split), town)

    def _subject(self, relation: Relation) -> str:
        if relation.name in ("room", "code"):
            return f"{self.rng.choice(self.language.words['device'])} {made_up_name(self.rng, self.split)}"
        return made_up_name(self.rng, self.split)

    def _value(self, kind: str) -> str:
        words, rng = self.language.words, self.rng
        if kind == "thing":
            return f"{rng.choice(words['colour'])} {rng.choice(words['object'])}"
        if kind == "dose":
            return f"{rng.randrange(5, 100) * 10} mg"
        if kind == "code":
            return str(rng.randrange(1000, 10000))
        return rng.choice(words[kind]) if kind in words else made_up_name(rng, self.split)

    def text(self, fillers: int) -> str:
        """The facts in order, with ``fillers`` filler sentences strewn in between."""
        sentences = [fact.say(self.rng) for fact in self.facts]
        for _ in range(fillers):
            sentences.insert(self.rng.randrange(len(sentences) + 1), self.rng.choice(self.language.filler))
        return " ".join(sentences)

    def question(self, kind: str) -> tuple[str, str, str]:
        """(question, answer, kind); falls back to a single-fact question where ``kind`` has no matching facts."""
        ask: Callable[[], tuple[str, str] | None] = {
            "which": self._which,
            "linked": self._linked,
            "absent": self._absent,
        }.get(kind, self._single)
        found = ask()
        if found is None:
            kind, found = "single", self._single()
        return self.language.frame.format(q=found[0]), found[1] + ".", kind

    def _single(self) -> tuple[str, str]:
        fact = self.rng.choice(self.facts)
        return fact.relation.asks.format(s=fact.subject), fact.value

    def _which(self) -> tuple[str, str] | None:
        options = [f for f in self.facts if f.relation.name in self.language.which]
        if not options:
            return None
        fact = self.rng.choice(options)
        return self.language.which[fact.relation.name].format(v=fact.value), fact.subject

    def _linked(self) -> tuple[str, str] | None:
        rivers = {f.subject: f.value for f in self.facts if f.relation.name == "river"}
        options = [f for f in self.facts if f.relation.name == "lives" and f.value in rivers]
        if not options:
            return None
        fact = self.rng.choice(options)
        return self.language.linked["river"].format(s=fact.subject), rivers[fact.value]

    def _absent(self) -> tuple[str, str]:
        relation = self.rng.choice(self.language.relations)
        named = {word for fact in self.facts for word in f"{fact.subject} {fact.value}".split()}
        subject = self._subject(relation)
        while subject.split()[-1] in named:
            subject = self._subject(relation)
        return relation.asks.format(s=subject), self.language.absent


KINDS = ("single", "single", "single", "which", "linked", "absent")


def item(rng: random.Random, split: str, facts: int, fillers: int, language: str | None = None) -> Item:
    """One random question over a context of ``facts`` facts and ``fillers`` filler sentences."""
    chosen = LANGUAGES[language or rng.choice(list(LANGUAGES))]
    world = World(rng, chosen, split, facts)
    context = world.text(fillers)
    question, answer, kind = world.question(rng.choice(KINDS))
    return Item(context, question, answer, kind, chosen.code)


def document(rng: random.Random, facts: int, fillers: int, questions: int) -> tuple[str, list[tuple[str, str]]]:
    """A training document: (context, [(question, answer), ...]); the context states every fact, in a random wording."""
    world = World(rng, LANGUAGES[rng.choice(list(LANGUAGES))], "train", facts)
    asked = [world.question(rng.choice(KINDS))[:2] for _ in range(questions)]
    return world.text(fillers), asked


def narrative(rng: random.Random, facts: int) -> str:
    """Varied, repetitive text: the same facts told again and again in changing order and wording."""
    world = World(rng, LANGUAGES[rng.choice(list(LANGUAGES))], "train", facts)
    told = [world.text(rng.randrange(3))]
    for _ in range(3):
        rng.shuffle(world.facts)
        told.append(world.text(rng.randrange(3)))
    return " ".join(told)
