"""``fstq demo``: calibrate, export, build and answer, dense and pruned side by side, on the model that comes along."""

from __future__ import annotations

import json as jsonlib
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fstq_export import data
from fstq_export.command import bars
from fstq_export.demo import facts
from fstq_export.demo.train import amounts
from fstq_export.pipeline import Done, Request, export
from fstq_export.recipe import Recipe
from fstq_export.report import verdict
from fstq_infer.commands import kept
from fstq_infer.errors import OptionError
from fstq_infer.machine import check_threads
from fstq_infer.runtime.generate import Generator
from fstq_infer.runtime.result import Result
from fstq_infer.terminal import out as told

MODEL = Path(__file__).parent / "model"
ITEMS, LENGTHS, LAYER = 520, (120, 320), 2  # questions to calibrate with, over contexts of so many tokens
DROP = 0.05  # allowed: what 130 held-out questions can bear out
KEEPS: tuple[float | Literal["auto"], ...] = (1.0, 0.5, 0.25)
BUNDLE = "model.bundle"


@dataclass(frozen=True, slots=True)
class Answers:
    """What one keep ratio gave: share of exact answers, median seconds, mean share of prompt tokens kept."""

    keep: float | Literal["auto"]
    exact: float
    prefill_s: float
    total_s: float
    kept: float

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self.keep if isinstance(self.keep, str) else "dense" if self.keep == 1 else f"{self.keep:.0%}"


def write_items(path: Path, split: str, count: int, seed: int) -> None:
    """Generated questions as a calibration file."""
    rng = random.Random(seed)
    items = [facts.item(rng, split, *amounts(rng.randint(*LENGTHS))) for _ in range(count)]
    write_rows(path, [{"context": i.context, "question": i.question, "answer": i.answer} for i in items])


def write_rows(path: Path, rows: Sequence[Mapping[str, str | None]]) -> None:
    """JSON lines."""
    path.write_text("".join(jsonlib.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def demo(*, out: Path, model: str | None, calib: Path | None, questions: int, threads: int | None, json: bool) -> None:
    """Run the whole main job; everything lands in ``out``."""
    if model is not None and calib is None:
        raise OptionError("--model needs --calib: a file with questions and answers that suit the model")
    if questions < 1:
        raise OptionError(f"--questions is {questions}; expected a whole number >= 1")
    check_threads(threads)
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out} is a file; name a folder with --out")
    given = data.read(calib) if calib is not None else []
    if any(example.answer is None for example in given):
        raise OptionError(f"{calib} holds plain text; the demo asks questions, so it needs lines with an answer")
    out.mkdir(parents=True, exist_ok=True)
    training, test = out / "calibration.jsonl", out / "test.jsonl"
    if calib is None:
        write_items(training, "valid", ITEMS, seed=1)
        write_items(test, "test", questions, seed=2)
    else:  # the last questions are asked, and calibration never sees them
        cut = max(len(given) - questions, len(given) // 2)
        for path, part in ((training, given[:cut]), (test, given[cut:])):
            write_rows(path, [{"prompt": example.prompt, "answer": example.answer} for example in part])
    examples = data.read(test)
    with bars() as progress:
        recipe = Recipe(prune_layer=LAYER if model is None else None, max_quality_drop=DROP)
        done = export(Request(model or str(MODEL), out / BUNDLE, recipe, training, overwrite=True), progress)
    generator = Generator.load(done.path, threads=threads)
    asked = [(e.prompt, e.answer) for e in examples if e.answer is not None]
    keeps = KEEPS if generator.engine.stages else KEEPS[:1]
    if generator.defaults.auto is not None:
        keeps = (*keeps, "auto")
    rows = answer(generator, asked, keeps)
    if json:
        told.data({"bundle": str(done.path), "questions": len(asked), "rows": [asdict(row) for row in rows]})
        return
    show(done, generator, asked, rows)


def answer(generator: Generator, asked: Sequence[tuple[str, str]], keeps: Sequence[Any]) -> list[Answers]:
    """All questions at every keep ratio, interleaved, through the engine."""
    results: dict[Any, list[tuple[bool, Result]]] = {keep: [] for keep in keeps}
    for prompt, wanted in asked:
        for keep in keeps:
            result = generator.generate(prompt, keep=keep, max_tokens=room(generator, wanted))
            results[keep].append((is_exact(result, wanted), result))
    return [
        Answers(
            keep,
            statistics.mean(hit for hit, _ in found),
            statistics.median(r.timings.prefill_s for _, r in found),
            statistics.median(r.timings.total_s for _, r in found),
            statistics.mean(len(r.kept) / len(r.prompt_tokens) for _, r in found),
        )
        for keep, found in results.items()
    ]


def room(generator: Generator, wanted: str) -> int:
    """Tokens to generate for an answer of that text: a few more than it has."""
    return len(generator.tokenizer.encode(wanted, special=False)) + 4


def is_exact(result: Result, wanted: str) -> bool:
    """Whether the greedy text begins with the whole expected answer."""
    return result.text.strip().startswith(wanted.strip())


def show(done: Done, generator: Generator, asked: Sequence[tuple[str, str]], rows: Sequence[Answers]) -> None:
    """One question with its kept tokens, then the table."""
    shown = rows[min(1, len(rows) - 1)]
    stated = [(q, a) for q, a in asked if a.strip().rstrip(".") in q]
    dense = (generator.generate(q, keep=1.0, max_tokens=room(generator, a)) for q, a in stated)
    right = (qa for qa, result in zip(stated, dense, strict=True) if is_exact(result, qa[1]))
    prompt, wanted = next(right, asked[0])
    result = generator.generate(prompt, keep=shown.keep, max_tokens=room(generator, wanted), stop=["\n"])
    told.rule(f"a question that the dense model answers, keep {shown.name}: dropped tokens are struck out")
    told.print(kept(generator, result))
    told.print(f"answer: {result.text.strip()}    expected: {wanted.strip()}")
    table = Table(title=f"{len(asked)} unseen questions through the engine")
    for name in ("keep", "prompt kept", "exact answers", "prefill ms", "total ms", "prefill speed-up"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.kept:.0%}",
            f"{row.exact:.0%}",
            f"{row.prefill_s * 1e3:.1f}",
            f"{row.total_s * 1e3:.1f}",
            f"{rows[0].prefill_s / row.prefill_s:.2f}x",
        )
    told.print(table)
    told.print(verdict(done.report))
    told.print(f"evidence: {done.path / 'report.html'}")
