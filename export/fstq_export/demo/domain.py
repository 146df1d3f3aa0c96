"""A domain that the demo model does not know: three topics of new relations, in English and in a fifth language.

A subject has several facts here, all of one topic, so that the relation asked for decides the answer and not the name
alone. The wording is in domain.json; names and their splits are those of facts.py.
"""

from __future__ import annotations

import json
import random
from importlib import resources

from fstq_export.demo import facts
from fstq_export.demo.facts import Item, Language, Relation, World, made_up_name

_WORDING = json.loads((resources.files(__package__) / "domain.json").read_text("utf-8"))
TOPICS: dict[str, tuple[str, ...]] = {topic: tuple(names) for topic, names in _WORDING["topics"].items()}


LANGUAGES = {
    code: facts.language_of(code, {"filler": getattr(facts.LANGUAGES.get(code), "filler", None)} | wording)
    for code, wording in _WORDING["languages"].items()
}


class Topic(World):
    """Facts of one topic about few subjects: each has about one fact of every relation."""

    def __init__(self, rng: random.Random, language: Language, split: str, topic: str, count: int) -> None:
        relations = [relation for relation in language.relations if relation.name in TOPICS[topic]]
        subjects = -(-count // len(relations)) + 1
        self._pool = [made_up_name(rng, split) for _ in range(subjects)]
        super().__init__(rng, language, split, count, relations)

    def _subject(self, relation: Relation) -> str:
        return self.rng.choice(self._pool)


def item(rng: random.Random, split: str, topic: str, count: int, fillers: int, language: str | None = None) -> Item:
    """One question over a context of ``count`` facts of one topic and ``fillers`` filler sentences."""
    chosen = LANGUAGES[language or rng.choice(list(LANGUAGES))]
    world = Topic(rng, chosen, split, topic, count)
    context = world.text(fillers)
    question, answer, kind = world.questions(1, ("single",))[0]
    return Item(context, question, answer, kind, chosen.code)
