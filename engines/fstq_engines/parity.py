"""Does an engine compute what its bundle does? The same token batches through both, one after the other in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters.store import DTYPES, Adapter
from fstq_infer.bundle import Manifest, ModelInfo
from fstq_infer.errors import ParityError
from fstq_infer.runtime.engine import Engine, Float32, Int64, Stage
from fstq_infer.runtime.options import keep_counts, keep_ratios

TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}  # in units of the logits' deviation, where above 1
ROUNDED, AGREEING = 0.3, 0.75  # where inputs are rounded: mean square difference of logits, share of equal kept tokens
LONG, SHORT, SMALL_MODEL = 96, 32, 50_000_000  # tokens of a prefill; parameters up to which it is the long one
DECODE_STEPS = 4
RANK, GAIN = 3, 0.1  # of a random adapter
SEED, SHARE = 0, 600_000  # millionths of the score mass that stay where a prompt is pruned adaptively


@dataclass(frozen=True, slots=True)
class Case:
    """A left-padded batch: texts with the tokens that are decoded after them, and how many of each row to keep."""

    name: str
    rows: tuple[Int64, ...]
    keep: Int64


@dataclass(frozen=True, slots=True)
class Output:
    """Logits of prefill and each decode step, and the kept indices of the prefill."""

    logits: tuple[Float32, ...]
    kept: tuple[Int64, ...]


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest logits difference over all cases, in the unit of ``tolerance``; the cases; longest prefill in tokens."""

    difference: float
    tolerance: float
    cases: tuple[str, ...]
    tokens: int


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
        lengths = [len(row) - DECODE_STEPS for row in case.rows]
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        positions = np.full_like(ids, -1)
        for row, (tokens, length) in enumerate(zip(case.rows, lengths, strict=True)):
            ids[row, -length:] = tokens[:length]
            positions[row, -length:] = np.arange(length)
        step = engine.forward(ids, positions, case.keep, engine.empty_cache(len(lengths)))
        kept, logits = step.kept, [step.logits.copy()]
        for number in range(DECODE_STEPS):
            ids = np.array([[tokens[length + number]] for tokens, length in zip(case.rows, lengths, strict=True)])
            positions = np.array([[length + number] for length in lengths], np.int64)
            step = engine.forward(ids, positions, np.ones_like(case.keep), step.cache)
            logits.append(step.logits.copy())
        outputs.append(Output(tuple(logits), kept))
    return outputs


def run_all(engine: Engine, made: Sequence[Case], manifest: Manifest) -> list[Output]:
    """What an engine makes of the cases, and of :func:`adapted_cases` with an adapter of random numbers."""
    outputs = run(engine, made)
    adapter = _random_adapter(manifest)
    for case in adapted_cases(made, manifest):
        rows = [None] * (len(case.rows) - 1) + [adapter]  # of several rows the last one
        outputs += run(engine.adapted(rows), [case])
    return outputs


def adapted_cases(made: Sequence[Case], manifest: Manifest) -> list[Case]:
    """The cases again where the graph has inputs for adapters."""
    if manifest.lora is None:
        return []
    return [replace(case, name=f"{case.name}, adapter") for case in made]


def _random_adapter(manifest: Manifest) -> Adapter:
    rng = np.random.default_rng(SEED)
    arrays: dict[str, NDArray[np.float64]] = {}
    kind = DTYPES.get(manifest.model.dtype, np.dtype(np.float32))
    for one in manifest.lora.linears if manifest.lora is not None else ():
        rank = min(RANK, manifest.lora.rank) if manifest.lora is not None else 0
        a, b = rng.standard_normal((one.inputs, rank)), rng.standard_normal((rank, one.outputs))
        arrays |= dict(zip(one.ports, (a * one.inputs**-0.5, b * GAIN), strict=True))
    return Adapter("random", {name: array.astype(kind) for name, array in arrays.items()}, False, None)


def compare(
    made: Sequence[Case], expected: Sequence[Output], found: Sequence[Output], dtype: str, rounded: bool = False
) -> Parity:
    """Raises ParityError, naming case and step, where kept indices differ or logits differ by more than allowed.

    rounded: the engine rounds inputs of layers to int8, which the bundle's graph does not. Nothing is equal then; root
    mean square differences are compared, and most tokens that are kept have to be the same. That shows a graph that
    computes something else, not a small fault in one layer.
    """
    allowed, worst = ROUNDED if rounded else TOLERANCE[dtype], 0.0
    advice = "Nothing was kept. Please report the model and these versions; another onnxruntime version may do better."
    for case, one, other in zip(made, expected, found, strict=True):
        for stage, (ours, theirs) in enumerate(zip(one.kept, other.kept, strict=True), 1):
            if not (_agree(ours, theirs) if rounded else np.array_equal(ours, theirs)):
                count = ours.size if ours.shape != theirs.shape else int((ours != theirs).sum())
                raise ParityError(
                    f"the engine keeps other tokens than its bundle's graph: {case.name}, stage {stage}, {count} of "
                    f"{ours.size} indices differ. {advice}"
                )
        for number, (want, have) in enumerate(zip(one.logits, other.logits, strict=True)):
            apart = want - have
            size = np.sqrt(np.mean(apart**2)) if rounded else np.abs(apart).max()
            difference = float(size) / (float(want.std()) if rounded else max(1.0, float(want.std())))
            if not difference <= allowed:  # NaN too
                step = f"decode step {number}" if number else "prefill"
                raise ParityError(
                    f"the engine computes other logits than its bundle's graph: {case.name}, {step}: difference "
                    f"{difference:.3g}, allowed {allowed:g}. {advice}"
                )
            worst = max(worst, difference)
    tokens = max(len(row) - DECODE_STEPS for case in made for row in case.rows)
    return Parity(worst, allowed, tuple(case.name for case in made), tokens)


def _agree(ours: Int64, theirs: Int64) -> bool:
    """Whether most kept columns are the same, row by row."""
    for one, other in zip(ours, theirs, strict=True):
        kept, found = set(one.tolist()) - {-1}, set(other.tolist()) - {-1}
        if len(kept & found) < AGREEING * max(len(kept), len(found)):
            return False
    return True
