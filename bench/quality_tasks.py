"""What bench/quality.py measures: models, calibration data and tests, drawn anew for each seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import SHARED
from fstq_export import data, source
from fstq_export.demo import facts
from fstq_export.demo.run import MODEL
from fstq_export.demo.train import amounts
from fstq_export.reference import reference

DEMO, SECOND, RECALL, STORIES = "demo model", "demo model, second question", "stories260k-recall", "stories260k"
PROMPT, CONTINUATION = 240, 60  # tokens of a story, and of what follows


@dataclass(frozen=True, slots=True)
class Test:
    """Items of one prompt length. bridges: texts between the prompts, which are pruned, and the answers."""

    examples: Sequence[data.Example]
    bridges: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A model, calibration data, and tests by prompt length; measured as exact match or as nll (nats per token).

    wanted: least exact match over dense, by keep. again: asked about contexts that were pruned for another question.
    stages: prune layers at which two stages are compared with one, by the first seed.
    """

    name: str
    model: Path
    layer: int
    calibration: Path
    tests: dict[int, Test]
    wanted: dict[float, float]
    metric: str = "exact"
    again: dict[int, Test] | None = None
    stages: tuple[int, int] | None = None


def questions(path: Path, split: str, lengths: Sequence[int], count: int, seed: int) -> Path:
    """Generated questions over contexts of about those lengths in tokens, as a file."""
    rng = random.Random(seed)
    items = [facts.item(rng, split, *amounts(lengths[i % len(lengths)])) for i in range(count)]
    return save(path, [{"context": i.context, "question": i.question, "answer": i.answer} for i in items])


def save(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def second_questions(tokens: int, count: int, seed: int) -> Test:
    """Contexts with two questions each: the first prunes, and with its answer is the bridge to the second."""
    rng, examples, bridges = random.Random(seed), [], []
    while len(examples) < count:
        n_facts, n_fillers = amounts(tokens)
        world = facts.World(rng, facts.LANGUAGES[rng.choice(list(facts.LANGUAGES))], "test", n_facts)
        context = world.text(n_fillers)
        (first, given, _), (second, answer, _) = world.questions(2)
        examples.append(data.Example(f"{context} {first}", answer))
        bridges.append(f"{given} {second}")
    return Test(examples, bridges)


@torch.no_grad()
def stories(model: Path, path: Path, count: int, seed: int) -> Path:
    """Texts that the model samples itself: prompts of 240 tokens and their continuations of 60."""
    found = source.resolve(str(model), None)
    tokens = source.tokenizer(found)
    rows: list[dict[str, str]] = []
    torch.manual_seed(seed)
    with reference(found, stream=False) as decoder:
        while len(rows) < count:
            ids, cache = torch.full((32, 1), tokens.bos_token_id), None
            for _ in range(PROMPT + CONTINUATION):
                output = decoder.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                ids = torch.cat([ids, torch.multinomial(output.logits[:, -1].softmax(-1), 1)], 1)
            for row in ids[:, 1:].tolist():
                cut = [tokens.decode(part).strip() for part in (row[:PROMPT], row[PROMPT:])]
                if tokens.bos_token_id not in row and tokens.eos_token_id not in row and all(cut):
                    rows.append({"prompt": cut[0], "answer": cut[1]})
    return save(path, rows[:count])


def tasks(folder: Path, seed: int, short: bool, only: str | None = None) -> list[Task]:
    """What is measured, or the one task of that name; for each seed other draws of the same generators."""
    makers = {DEMO: lambda: _demo(folder, seed, short)}
    if not short and all((SHARED / "models" / name).exists() for name in (RECALL, STORIES)):
        makers = {RECALL: _recall, STORIES: lambda: _stories(folder, seed), **makers}
    return [make() for name, make in makers.items() if only in (None, name)]  # drawing texts takes minutes


def _demo(folder: Path, seed: int, short: bool) -> Task:
    lengths = (256,) if short else (512, 1000)
    calibration = (128, 256) if short else (256, 512, 1000)
    count, asked = (300, 60) if short else (900, 120)
    return Task(
        DEMO,
        MODEL,
        2,
        questions(folder / "demo.jsonl", "valid", calibration, count, 1000 + seed),
        {n: Test(data.read(questions(folder / f"demo-{n}.jsonl", "test", (n,), asked, 2000 + seed))) for n in lengths},
        {0.5: 0.995, 0.25: 0.99, 0.125: 0.96},
        again=None if short else {n: second_questions(n, asked // 2, 3000 + seed) for n in lengths},
        stages=None if short else (1, 2),
    )


def _recall() -> Task:
    items = SHARED / "data" / "recall"
    tests = {150: Test(data.read(items / "val.jsonl"))}
    return Task(
        RECALL, SHARED / "models" / RECALL, 2, items / "calib.jsonl", tests, {0.5: 0.98, 0.25: 0.85}, stages=(1, 2)
    )


def _stories(folder: Path, seed: int) -> Task:
    told = SHARED / "models" / STORIES
    calibration = stories(told, folder / "stories.jsonl", 1200, 4000 + seed)
    tests = {PROMPT: Test(data.read(stories(told, folder / "told.jsonl", 200, 5000 + seed)))}
    return Task(STORIES, told, 2, calibration, tests, {}, "nll")
