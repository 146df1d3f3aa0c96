"""A server's state between two rounds in one file: model, round, what strategies have gathered, results so far.

Strategies are not asked: arrays are found among their attributes (moments of FedAdam, momentum of FedAvgM). One whose
state is more than arrays, such as a privacy accountant, is refused rather than saved in part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fstq_infer.errors import StateError
from fstq_infer.federated import saved
from fstq_infer.federated.flower import Array, ArrayRecord, MetricRecord, Result
from fstq_infer.federated.strategy import FstqStrategy

VERSION = 1
SCALARS = ("clipping_norm",)  # numbers that strategies change from round to round
HISTORIES = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
DOWNLINK = "downlink"  # kind of the arrays of a Downlink
MODEL, MEAN = -1, -2  # levels of the model's arrays and of their mean; the strategies' are 0, 1, ... from the outermost


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a federation stands: the last round that was finished, the weights after it, all results, and the mean of
    the weights where one is kept."""

    round: int
    arrays: Any
    result: Any
    mean: Any = None


def save(path: Path, strategy: Any, progress: Progress, seed: int) -> None:
    """Replace the checkpoint. Raises StateError where it cannot be written or would not hold all."""
    chain = _chain(strategy)
    entries = [(MODEL, "model", "record", name, array.numpy()) for name, array in progress.arrays.items()]
    entries += [(MEAN, "mean", "record", name, array.numpy()) for name, array in (progress.mean or {}).items()]
    scalars = list[tuple[int, str, float]]()
    for level, part in enumerate(chain):
        if getattr(part, "accountant", None) is not None:
            raise StateError(
                f"{type(part).__name__} counts the privacy that was spent, which a checkpoint cannot hold: going on "
                f"from it would spend more than is counted. Run without checkpoints."
            )
        for name, value in vars(part).items() if not isinstance(part, FstqStrategy) else ():
            entries += [(level, name, kind, key, array) for kind, key, array in _arrays_in(value)]
            if name in SCALARS:
                scalars.append((level, name, float(value)))
        if isinstance(part, FstqStrategy) and part.downlink is not None:
            entries += [(level, "downlink", DOWNLINK, key, array) for key, array in part.downlink.state()[0].items()]
    facts = {
        "version": VERSION,
        "round": progress.round,
        "seed": seed,
        "strategies": [type(part).__name__ for part in chain],
        "entries": [entry[:4] for entry in entries],
        "scalars": scalars,
        "ours": [_ours(part) for part in chain],
        "results": {name: _history(getattr(progress.result, name)) for name in HISTORIES},
    }
    saved.save(path, {str(number): entry[4] for number, entry in enumerate(entries)}, facts)


def load(path: Path, strategy: Any, seed: int) -> Progress:
    """Read a checkpoint into the strategy. Raises StateError for one that is damaged, or of another set-up."""
    arrays, facts = saved.load(path)
    chain = _chain(strategy)
    expected = {"version": VERSION, "seed": seed, "strategies": [type(part).__name__ for part in chain]}
    for key, value in expected.items():
        if facts.get(key) != value:
            raise StateError(
                f"{path} was written with {key} {facts.get(key)}, this server has {value}. Start it as it was started "
                f"before, or begin anew without it."
            )
    try:
        _restore(chain, arrays, facts)
        model, mean = (
            ArrayRecord({key: Array(arrays[str(number)]) for number, (level, _, _, key) in enumerate(facts["entries"])
                         if level == wanted})
            for wanted in (MODEL, MEAN)
        )  # fmt: skip
        result = Result()
        for name in HISTORIES:
            history = {int(round): MetricRecord(metrics) for round, metrics in facts["results"][name].items()}
            setattr(result, name, history)
        result.arrays = mean or model
        return Progress(int(facts["round"]), model, result, mean or None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is damaged: {error!r}. Begin anew without it.") from error


def _chain(strategy: Any) -> list[Any]:
    """The strategy, the one that it wraps, and so on."""
    chain = [strategy]
    while (inner := getattr(chain[-1], "inner", None) or getattr(chain[-1], "strategy", None)) is not None:
        chain.append(inner)
    return chain


def _arrays_in(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(kind, key, array) of an attribute; nothing for one that holds no arrays."""
    if isinstance(value, ArrayRecord):
        yield from (("record", key, array.numpy()) for key, array in value.items())
    elif isinstance(value, dict) and all(isinstance(array, np.ndarray | np.generic) for array in value.values()):
        yield from (("dict", str(key), np.asarray(array)) for key, array in value.items())
    elif isinstance(value, list) and all(isinstance(array, np.ndarray | np.generic) for array in value):
        yield from (("list", "", np.asarray(array)) for array in value)


def _restore(chain: list[Any], arrays: dict[str, Any], facts: dict[str, Any]) -> None:
    found: dict[tuple[int, str], tuple[str, list[tuple[str, Any]]]] = {}
    for number, (level, name, kind, key) in enumerate(facts["entries"]):
        if level >= 0:
            found.setdefault((level, name), (kind, []))[1].append((key, arrays[str(number)]))
    for (level, name), (kind, items) in found.items():
        if kind == DOWNLINK:
            continue
        value: Any = [array for _, array in items] if kind == "list" else dict(items)
        if kind == "record":
            value = ArrayRecord({key: Array(array) for key, array in items})
        setattr(chain[level], name, value)
    for level, name, number in facts["scalars"]:
        setattr(chain[level], name, number)
    for level, (part, held) in enumerate(zip(chain, facts["ours"], strict=True)):
        if isinstance(part, FstqStrategy) and held is not None:
            if held["base"] != part.base.hex():
                raise StateError(
                    f"the checkpoint is for base model {held['base']}, this server has {part.base.hex()}. "
                    f"Give it the same."
                )
            part.run = held["run"]
            part.heard = {int(node): round for node, round in held["heard"].items()}
            part.uplinks = {int(node): speed for node, speed in held["uplinks"].items()}
            part.refused = Counter(held["refused"])
            if part.downlink is not None and held["downlink"] is not None:
                _, items = found.get((level, "downlink"), (DOWNLINK, []))
                part.downlink.restore(dict(items), held["downlink"])


def _ours(part: Any) -> dict[str, Any] | None:
    if not isinstance(part, FstqStrategy):
        return None
    return {
        "run": part.run,
        "base": part.base.hex(),
        "heard": part.heard,
        "uplinks": part.uplinks,
        "refused": part.refused,
        "downlink": None if part.downlink is None else part.downlink.state()[1],
    }


def _history(records: dict[int, Any]) -> dict[str, Any]:
    return {str(round): dict(metrics) for round, metrics in records.items()}
