"""Measuring one engine, dense against pruned: interleaved rounds, medians, memory. Knows the engine protocol only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fstq_infer.errors import OptionError
from fstq_infer.machine import description, peak_rss
from fstq_infer.runtime.engine import Engine
from fstq_infer.runtime.options import keep_counts, keep_ratios


@dataclass(frozen=True, slots=True)
class Row:
    """Medians at one keep ratio. Times in seconds; kv_bytes in bytes.

    prefill_s: in the engine, for the prompt. ttft_s: with choosing the first token. decode_step_s: per later token, 0
    where only one token was asked for.
    """

    keep: float
    kept: int
    ttft_s: float
    prefill_s: float
    decode_step_s: float
    total_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All rows of one run, with what it was run on. peak_rss: of the whole process, bytes."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    machine: dict[str, Any]
    peak_rss: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def measure(
    engine: Engine, prompt_tokens: int, new_tokens: int, keeps: Sequence[float], repeats: int, seed: int = 0
) -> BenchReport:
    """One warm-up and ``repeats`` measured rounds, each running every keep ratio once on the same random prompt.

    Raises OptionError for lengths that do not fit the engine's context.
    """
    if prompt_tokens < 1 or new_tokens < 1 or repeats < 1 or not keeps:
        raise OptionError("prompt-tokens, new-tokens, repeats and the number of keep ratios must be at least 1")
    if prompt_tokens + new_tokens > engine.max_positions:
        raise OptionError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {engine.max_positions}; use fewer"
        )
    ids = np.random.default_rng(seed).integers(0, engine.vocab_size, (1, prompt_tokens))
    for keep in keeps:
        keep_ratios(keep, engine.stages)  # all of them, before anything is measured
    runs: dict[float, list[Run]] = {keep: [] for keep in keeps}
    for round_ in range(repeats + 1):
        for keep in keeps:
            run = once(engine, ids, new_tokens, keep)
            if round_:
                runs[keep].append(run)
    rows = tuple(summary(keep, runs[keep], prompt_tokens, new_tokens) for keep in keeps)
    return BenchReport(prompt_tokens, new_tokens, repeats, description(), peak_rss(), rows)


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt and its answer: moments in seconds of the clock, tokens kept, bytes of the cache at the end."""

    began: float
    prefilled: float
    first: float
    ended: float
    kept: int
    kv_bytes: int


def summary(keep: float, runs: Sequence[Run], prompt_tokens: int, new_tokens: int) -> Row:
    """Medians of at least one run."""
    prefill = statistics.median(run.prefilled - run.began for run in runs)
    first = statistics.median(run.first - run.began for run in runs)
    decode = statistics.median(run.ended - run.first for run in runs)
    total = statistics.median(run.ended - run.began for run in runs)
    step = decode / (new_tokens - 1) if new_tokens > 1 else 0.0
    speed = 1 / step if step else 0.0
    kept, held = runs[-1].kept, runs[-1].kv_bytes
    return Row(keep, kept, first, prefill, step, total, prompt_tokens / prefill, speed, held)


def once(engine: Engine, ids: Any, new_tokens: int, keep: float, clock: Callable[[], float] = time.perf_counter) -> Run:
    """One greedy run that ignores ends; ids: (1, prompt)."""
    prompt = ids.shape[1]
    ratios = keep_ratios(keep, engine.stages)
    counts = np.array([keep_counts(prompt, ratios, engine.stages)], np.int64).reshape(1, len(engine.stages))
    cache = engine.empty_cache(1)
    began = clock()
    step = engine.forward(ids, np.arange(prompt)[None], counts, cache)
    prefilled = clock()
    token = int(step.logits[0].argmax())
    first = clock()
    kept = int((step.kept[-1] >= 0).sum()) if step.kept else prompt
    one = np.ones((1, len(engine.stages)), np.int64)
    for position in range(prompt, prompt + new_tokens - 1):
        step = engine.forward(np.array([[token]]), np.array([[position]]), one, step.cache)
        token = int(step.logits[0].argmax())
    return Run(began, prefilled, first, clock(), kept, step.cache.bytes)
