"""Does an engine compute what its bundle does? The same token batches through both, one after the other in memory.

An engine that rounds inputs of layers computes something else on purpose. How far it may be away is measured: as far as
the bundle's own graph is, with the same rounding written out, and a margin, since a difference in the last bit can make
another code of an input, and many such make up another rounding of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.adapters.store import DTYPES, Adapter
from fstq_infer.bundle import ModelInfo
from fstq_infer.errors import ParityError
from fstq_infer.runtime.engine import Engine, Float32, Int64, Stage
from fstq_infer.runtime.options import keep_counts, keep_ratios

TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}  # in units of the logits' deviation, where above 1
MARGIN = 2.0  # of what rounding alone does to logits and kept tokens
LEAST_TOKENS = 2  # other kept tokens that are allowed in any case, per row
LONG, SHORT, SMALL_MODEL = 96, 32, 50_000_000  # tokens of a prefill; parameters up to which it is the long one
DECODE_STEPS = 4
RANK, GAIN = 3, 0.1  # of a random adapter
SEED, SHARE = 0, 600_000  # millionths of the score mass that stay where a prompt is pruned adaptively


@dataclass(frozen=True, slots=True)
class Case:
    """A left-padded batch: texts with the tokens that are decoded after them, and how many of each row to keep.

    adapters: of each row; empty where none has one.
    """

    name: str
    rows: tuple[Int64, ...]
    keep: Int64
    adapters: tuple[Adapter | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """Logits of prefill and each decode step, and the kept indices of the prefill."""

    logits: tuple[Float32, ...]
    kept: tuple[Int64, ...]


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest logits difference over all cases, in the unit of ``tolerance``; the cases; longest prefill in tokens.

    tokens_apart: most kept tokens of a row that differ, and how many may.
    """

    difference: float
    tolerance: float
    cases: tuple[str, ...]
    tokens: int
    tokens_apart: int = 0
    tokens_allowed: int = 0


def cases(model: ModelInfo, stages: Sequence[Stage]) -> list[Case]:
    """Seeded random tokens: dense, pruned where there are stages, and a padded batch of two."""
    forced = max((stage.sink + stage.window for stage in stages), default=0)
    length = LONG if model.parameters <= SMALL_MODEL else SHORT
    length = max(1, min(max(length, 2 * forced), model.max_positions - DECODE_STEPS))
    rng = np.random.default_rng(SEED)
    half = keep_ratios(0.5, stages) if stages else ()

    def make(name: str, lengths: Sequence[int], ratios: Sequence[float]) -> Case:
        rows = tuple(rng.integers(0, model.vocab_size, n + DECODE_STEPS, np.int64) for n in lengths)
        keep = [keep_counts(n, ratios, stages) for n in lengths]
        return Case(name, rows, np.array(keep, np.int64).reshape(len(lengths), len(stages)))

    made = [make("dense", [length], [1.0] * len(stages))]
    if stages:
        made.append(make("pruned", [length], half))
        made.append(replace(make("adaptive", [length], half), keep=np.full((1, len(stages)), -SHARE)))
    made.append(make("padded batch", [length, max(1, length * 2 // 3)], half))
    return made


def run(engine: Engine, made: Sequence[Case]) -> list[Output]:
    """What an engine makes of the cases."""
    outputs = []
    for case in made:
        one = engine.adapted(case.adapters) if any(case.adapters) else engine
        lengths = [len(row) - DECODE_STEPS for row in case.rows]
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        positions = np.full_like(ids, -1)
        for row, (tokens, length) in enumerate(zip(case.rows, lengths, strict=True)):
            ids[row, -length:] = tokens[:length]
            positions[row, -length:] = np.arange(length)
        step = one.forward(ids, positions, case.keep, one.empty_cache(len(lengths)))
        kept, logits = step.kept, [step.logits.copy()]
        for number in range(DECODE_STEPS):
            ids = np.array([[tokens[length + number]] for tokens, length in zip(case.rows, lengths, strict=True)])
            positions = np.array([[length + number] for length in lengths], np.int64)
            step = one.forward(ids, positions, np.ones_like(case.keep), step.cache)
            logits.append(step.logits.copy())
        outputs.append(Output(tuple(logits), kept))
    return outputs


def adapted(made: Sequence[Case], ports: LoraPorts, dtype: str) -> list[Case]:
    """The cases again, with an adapter in the last row; and with one that brings its own probes, in all rows."""
    one, other = random_adapter(ports, dtype), random_adapter(ports, dtype, probes=True)
    cases = []
    for case in made:
        rows = len(case.rows)
        cases.append(replace(case, name=f"{case.name}, adapter", adapters=(*[None] * (rows - 1), one)))
        if ports.probes and case.name != "dense":
            cases.append(replace(case, name=f"{case.name}, adapter with probes", adapters=(other,) * rows))
    return cases


def random_adapter(ports: LoraPorts, dtype: str, probes: bool = False) -> Adapter:
    """One of random numbers that changes every layer that can be changed; probes: those as well."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, NDArray[np.float64]] = {}
    rank = min(RANK, ports.rank)
    for one in ports.linears:
        a, b = rng.standard_normal((one.inputs, rank)), rng.standard_normal((rank, one.outputs))
        arrays |= dict(zip(one.ports, (a * one.inputs**-0.5, b * GAIN), strict=True))
    kind = DTYPES.get(dtype, np.dtype(np.float32))
    found: dict[str, NDArray[Any]] = {name: array.astype(kind) for name, array in arrays.items()}
    if probes:
        for name, shape in ports.probes.items():
            fan = np.prod(shape) / max(shape)  # (inputs, outputs) or (outputs, inputs, width): about their inputs
            found[name] = (rng.standard_normal(shape) * fan**-0.5).astype(np.float32)
    return Adapter("random", found, probes and bool(ports.probes), None)


ADVICE = "Nothing was kept. Please report the model and these versions; another onnxruntime version may do better."


def compare(made: Sequence[Case], expected: Sequence[Output], found: Sequence[Output], dtype: str) -> Parity:
    """Raises ParityError, naming case and step, where kept indices differ or logits differ by more than allowed."""
    allowed, worst = TOLERANCE[dtype], 0.0
    for case, one, other in zip(made, expected, found, strict=True):
        for stage, (ours, theirs) in enumerate(zip(one.kept, other.kept, strict=True), 1):
            if not np.array_equal(ours, theirs):
                count = ours.size if ours.shape != theirs.shape else int((ours != theirs).sum())
                raise ParityError(
                    f"the engine keeps other tokens than its bundle's graph: {case.name}, stage {stage}, {count} of "
                    f"{ours.size} indices differ. {ADVICE}"
                )
        for number, (want, have) in enumerate(zip(one.logits, other.logits, strict=True)):
            difference = float(np.abs(want - have).max()) / max(1.0, float(want.std()))
            if not difference <= allowed:  # NaN too
                raise ParityError(
                    f"the engine computes other logits than its bundle's graph: {case.name}, {_step(number)}: "
                    f"difference {difference:.3g}, allowed {allowed:g}. {ADVICE}"
                )
            worst = max(worst, difference)
    return Parity(worst, allowed, tuple(case.name for case in made), _longest(made))


def compare_rounded(
    made: Sequence[Case],
    expected: Sequence[Output],
    written: Sequence[Output],
    found: Sequence[Output],
    dtype: str,
    what: str = "rounding inputs to int8",
) -> Parity:
    """An engine that rounds inputs: its outputs beside the bundle's, and beside those with the rounding written out.

    Differences of logits are root mean squares in units of their deviation, of cases that keep the same tokens. Raises
    ParityError where the engine is further from its bundle than ``MARGIN`` times what rounding does.
    """
    apart = max(_tokens_apart(one, other) for one, other in zip(expected, written, strict=True))
    tokens_allowed = int(MARGIN * apart) + LEAST_TOKENS
    noise = _distances(expected, written)
    allowed = MARGIN * max(noise.values(), default=0.0) + TOLERANCE[dtype]
    most, worst = 0, 0.0
    for case, one, other in zip(made, expected, found, strict=True):
        count = _tokens_apart(one, other)
        if count > tokens_allowed:
            raise ParityError(
                f"the engine keeps other tokens than its bundle's graph: {case.name}: {count} of a row differ, at most "
                f"{tokens_allowed} may, as {what} alone changes {apart}. {ADVICE}"
            )
        most = max(most, count)
    for (number, step), difference in _distances(expected, found).items():
        if not difference <= allowed:
            raise ParityError(
                f"the engine computes other logits than its bundle's graph: {made[number].name}, {_step(step)}: "
                f"difference {difference:.3g}, allowed {allowed:.3g}, {MARGIN:g} times what {what} alone "
                f"does. {ADVICE}"
            )
        worst = max(worst, difference)
    return Parity(worst, allowed, tuple(case.name for case in made), _longest(made), most, tokens_allowed)


def _distances(expected: Sequence[Output], found: Sequence[Output]) -> dict[tuple[int, int], float]:
    """(case, step) -> how far logits are apart, for cases whose kept tokens are the same."""
    return {
        (number, step): float(np.sqrt(np.mean((want - have) ** 2)) / max(float(want.std()), 1e-30))
        for number, (one, other) in enumerate(zip(expected, found, strict=True))
        if not _tokens_apart(one, other)
        for step, (want, have) in enumerate(zip(one.logits, other.logits, strict=True))
    }


def _tokens_apart(one: Output, other: Output) -> int:
    """Most tokens that a row keeps after some stage in one output and not in the other."""
    most = 0
    for ours, theirs in zip(one.kept, other.kept, strict=True):
        for mine, their in zip(ours, theirs, strict=True):
            kept, found = set(mine.tolist()) - {-1}, set(their.tolist()) - {-1}
            most = max(most, len(kept - found), len(found - kept))
    return most


def _step(number: int) -> str:
    return f"decode step {number}" if number else "prefill"


def _longest(made: Sequence[Case]) -> int:
    return max(len(row) - DECODE_STEPS for case in made for row in case.rows)
