"""The rounds of a federation: as Flower's Strategy.start, but they go on after a restart and need not wait for all.

>>> federate(strategy, grid, arrays, Rounds(30, checkpoint=Path("server.safetensors"), resume=True))
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fstq_infer.errors import OptionError, StateError
from fstq_infer.federated import average as averages
from fstq_infer.federated import checkpoint as checkpoints
from fstq_infer.federated.checkpoint import Progress
from fstq_infer.federated.collect import collect
from fstq_infer.federated.flower import ConfigRecord, Result

log = logging.getLogger(__name__)
Evaluate = Callable[[int, Any], Any]  # (round, arrays) -> MetricRecord or None


@dataclass(frozen=True, slots=True)
class Rounds:
    """rounds: the last one. seed: of the draw of clients. timeout: seconds for the replies of a round. enough: good
    replies to training after which a round goes on, None for all. checkpoint: file written after every round. resume:
    go on after it, or begin where there is none yet; without it an existing file is not replaced. average: deliver a
    running mean of the weights with this exponent (average.py) in place of the last ones; clients still train, and
    evaluate, on the last ones. None: the last weights.
    """

    rounds: int
    seed: int = 0
    timeout: float = 3600.0
    enough: int | None = None
    checkpoint: Path | None = None
    resume: bool = False
    average: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.timeout <= 0 or (self.enough is not None and self.enough < 1):
            raise OptionError(
                f"rounds {self.rounds}, timeout {self.timeout}, enough {self.enough}: expected numbers above 0"
            )
        if self.average is not None and not 0 <= self.average < float("inf"):
            raise OptionError(
                f"the exponent of the average is {self.average}, expected 0 or more, or None for no average"
            )
        if self.resume and self.checkpoint is None:
            raise OptionError("resume needs the checkpoint to go on from. Name its file.")


@dataclass(frozen=True, slots=True)
class Report:
    """One round that is over. arrays: those delivered. train, evaluated: metrics, None for none. asked, replied:
    clients that trained."""

    round: int
    arrays: Any
    train: Any
    evaluated: Any
    asked: int
    replied: int
    seconds: float


def federate(
    strategy: Any,
    grid: Any,
    arrays: Any,
    settings: Rounds,
    train_config: Any = None,
    evaluate_config: Any = None,
    evaluate_fn: Evaluate | None = None,
    on_round: Callable[[Report], None] | None = None,
) -> Any:
    """Run all rounds and return Flower's Result. The same seed and replies give the same bits, resumed or not.

    Clients are drawn with Python's ``random``, as Flower's strategies do, seeded for each round and put back after it.
    on_round: called after each round, before its checkpoint is written: what it saves is there when a run goes on.
    Noise of privacy wrappers is not seeded: repeated noise would protect nothing. Raises StateError for a checkpoint
    that cannot be used.
    """
    progress = _start(strategy, arrays, settings, evaluate_fn)
    for number in range(progress.round + 1, settings.rounds + 1):
        began = time.monotonic()
        with _draw(settings.seed, number, "train"):
            config = ConfigRecord(dict(train_config or {}))
            requests = list(strategy.configure_train(number, progress.arrays, config, _Ordered(grid)))
        asked = len(requests)
        replies = collect(grid, requests, settings.timeout, settings.enough)
        trained, metrics = strategy.aggregate_train(number, replies)
        current, result = trained or progress.arrays, progress.result
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
            log.info("round %d: %s", number, dict(metrics))
        with _draw(settings.seed, number, "evaluate"):
            config = ConfigRecord(dict(evaluate_config or {}))
            requests = list(strategy.configure_evaluate(number, current, config, _Ordered(grid)))
        evaluated = strategy.aggregate_evaluate(number, collect(grid, requests, settings.timeout))
        if evaluated is not None:
            result.evaluate_metrics_clientapp[number] = evaluated
        mean = progress.mean
        if settings.average is not None:
            mean = averages.moved(mean, current, number, settings.average)
        delivered = current if mean is None else mean
        if evaluate_fn is not None and (central := evaluate_fn(number, delivered)) is not None:
            result.evaluate_metrics_serverapp[number] = central
        result.arrays = delivered
        if on_round is not None:
            seconds = time.monotonic() - began
            on_round(Report(number, delivered, metrics, evaluated, asked, len(replies), seconds))
        progress = Progress(number, current, result, mean)
        if settings.checkpoint is not None:
            checkpoints.save(settings.checkpoint, strategy, progress, settings.seed)
    return progress.result


def _start(strategy: Any, arrays: Any, settings: Rounds, evaluate_fn: Evaluate | None) -> Progress:
    path = settings.checkpoint
    if path is not None and path.exists():
        if not settings.resume:
            raise StateError(f"{path} exists already. Resume from it, or remove it to begin anew.")
        progress = checkpoints.load(path, strategy, settings.seed)
        if (progress.mean is None) != (settings.average is None):
            said = "last weights" if progress.mean is None else "a mean of weights"
            raise StateError(f"{path} was written by a server that delivers {said}. Start it as it was started before.")
        log.info("going on after round %d", progress.round)
        return progress
    result = Result()
    if evaluate_fn is not None and (metrics := evaluate_fn(0, arrays)) is not None:
        result.evaluate_metrics_serverapp[0] = metrics
    return Progress(0, arrays, result)


@contextlib.contextmanager
def _draw(seed: int, round: int, phase: str) -> Iterator[None]:
    """Seed Python's ``random`` for one draw of clients."""
    before = random.getstate()
    random.seed(f"{seed}/{round}/{phase}")
    try:
        yield
    finally:
        random.setstate(before)


class _Ordered:
    """A Grid whose nodes are listed in ascending order, since a draw takes places in that list."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def get_node_ids(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)
