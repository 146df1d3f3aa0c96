"""A domain that the demo model does not know: three topics of new relations, in English and in a fifth language.

The wording is in domain.json; facts, names and their splits are those of facts.py.
"""

from __future__ import annotations

import json
import random
from importlib import resources

from fstq_export.demo import facts
from fstq_export.demo.facts import Item, Language, World
from fstq_infer.errors import OptionError, suggestion

_WORDING = json.loads((resources.files(__package__) / "domain.json").read_text("utf-8"))
TOPICS: dict[str, tuple[str, ...]] = {topic: tuple(names) for topic, names in _WORDING["topics"].items()}
LANGUAGES = {
    code: facts.language_of(code, {"filler": getattr(facts.LANGUAGES.get(code), "filler", None)} | wording)
    for code, wording in _WORDING["languages"].items()
}


def world(rng: random.Random, language: Language, split: str, topic: str, count: int) -> World:
    """``count`` facts of one topic."""
    return World(rng, language, split, count, [one for one in language.relations if one.name in TOPICS[topic]])


def item(rng: random.Random, split: str, topic: str, count: int, fillers: int, language: str | None = None) -> Item:
    """One question over a context of ``count`` facts of one topic and ``fillers`` filler sentences.

    kind is the topic. Raises OptionError for an unknown topic or language.
    """
    if topic not in TOPICS:
        raise OptionError(f"topic is '{topic}'; {suggestion(topic, TOPICS)}")
    code = language or rng.choice(list(LANGUAGES))
    if code not in LANGUAGES:
        raise OptionError(f"language is '{code}'; {suggestion(code, LANGUAGES)}")
    told = world(rng, LANGUAGES[code], split, topic, count)
    context = told.text(fillers)
    question, answer, _ = told.questions(1, ("single",))[0]
    return Item(context, question, answer, topic, code)


def items(rng: random.Random, split: str, count: int, amounts: tuple[tuple[int, int], tuple[int, int]]) -> list[Item]:
    """``count`` questions, topics and languages in turn. amounts: least and most facts, least and most fillers."""
    (few, many), (least, most) = amounts
    pairs = [(topic, code) for code in LANGUAGES for topic in TOPICS]
    return [
        item(rng, split, topic, rng.randint(few, many), rng.randint(least, most), code)
        for topic, code in (pairs[number % len(pairs)] for number in range(count))
    ]
