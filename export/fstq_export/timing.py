"""Where a prefill's time goes: operator times of the written graph, summed by part, dense and pruned.

Knows ONNX Runtime's profiler and the parts that :mod:`fstq_export.segments` names; judges nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fstq_export import segments
from fstq_infer.machine import description
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import Keep, keep_counts, keep_ratios
from fstq_infer.runtime.ort import brief, import_onnxruntime, session_options
from fstq_infer.runtime.ort_caches import EMPTY

LARGEST = 200_000_000  # parameters; above, a second copy of the weights costs too much memory and time
RANDOM_TOKENS = 256
ROUNDS, SECONDS = 9, 1.0  # at most so many rounds, none begun after so many seconds
SELECTION = "probe and selection"


def measure(
    folder: Path,
    graph: str,
    parameters: int,
    stages: Sequence[Stage],
    keep: Keep,
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    max_positions: int,
) -> dict[str, Any]:
    """For report.json: milliseconds by part of one prefill, dense and (where ``keep`` < 1) pruned; or why not.

    prompts: real ones, of which the one of median length is read; without any, random ids are. The probe's time in a
    dense run stands apart (``dense_probe_ms``): a model without pruning has none.
    """
    if parameters > LARGEST:
        return {
            "skipped": f"the model has more than {LARGEST // 10**6} million parameters, and measuring would load its "
            "weights once more; 'fstq bench' measures the built engine"
        }
    if prompts:
        ids = np.array(sorted(prompts, key=len)[len(prompts) // 2], np.int64)
    else:
        ids = np.random.default_rng(0).integers(0, vocab_size, min(RANDOM_TOKENS, max_positions))
    dense, pruned = (keep_ratios(ratio, stages) if stages else () for ratio in (1.0, keep))
    runs = [dense, pruned] if pruned and pruned[-1] < 1 else [dense]
    counts = [keep_counts(len(ids), ratios, stages) for ratios in runs]
    try:
        events = _profile(folder / graph, ids, counts)
    except Exception as error:  # ONNX Runtime's have no common base, memory may run out; the bundle is good without
        return {"skipped": f"ONNX Runtime could not run the graph as a whole: {brief(error)}"}
    found = _by_part(events, _parts(folder / graph, stages), len(runs))
    probing = found[0].pop(SELECTION, None)
    return {
        "tokens": len(ids),
        "random": not prompts,
        "keep": runs[-1][-1] if stages else 1.0,
        "kept": counts[-1][-1] if stages else len(ids),
        "dense_ms": found[0],
        "dense_probe_ms": probing,
        "pruned_ms": found[1] if len(runs) > 1 else None,
        "machine": description(),
    }


def _profile(path: Path, ids: NDArray[np.int64], counts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The profiler's events of a warm-up and some rounds, each a run for every row of ``counts``.

    Optimised as an engine is, so that the times are its times.
    """
    ort, options = import_onnxruntime(), session_options(None)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="fstq-profile-") as scratch:
        options.profile_file_prefix = str(Path(scratch) / "prefill")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {
            given.name: np.zeros(
                [1 if axis == 0 else 0 if isinstance(size, str) else size for axis, size in enumerate(given.shape)],
                EMPTY[given.type][0],
            )
            for given in session.get_inputs()
        }
        feeds |= {"input_ids": ids[None], "position_ids": np.arange(len(ids))[None]}
        began, done = time.monotonic(), 0
        while done <= ROUNDS and (done < 2 or time.monotonic() - began < SECONDS):
            for count in counts:
                session.run(None, feeds | ({"keep": np.array([count], np.int64)} if count else {}))
            done += 1
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_bytes())
    return events


def _parts(path: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """Part of each of the graph's nodes, by name; the parts in the order in which they run."""
    border = stages[0].layer if stages else 0
    parts: dict[str, str] = {}
    for segment in segments.split(ir.load(path).graph):
        kind, _, number = segment.label.partition(" ")
        if kind == "stage":
            part = SELECTION
        elif kind == "layer":
            part = "layers" if not stages else "layers before" if int(number) < border else "layers after"
        else:
            part = kind
        parts |= {str(node.name): part for node in segment.nodes}
    return parts


def _by_part(events: Sequence[Mapping[str, Any]], parts: Mapping[str, str], kinds: int) -> list[dict[str, float]]:
    """Milliseconds by part for each kind of run: each operator's fastest, without the first round.

    A fused operator's name begins with that of one it replaced; one without such a name (an activation) belongs where
    the operator before it does.
    """
    fastest: list[dict[tuple[str, str], float]] = [{} for _ in range(kinds)]
    run, part = 0, next(iter(parts.values()))
    for event in events:  # in the order of their ends: a run comes after its operators
        if event.get("cat") == "Node":
            name = known = str(event["name"]).removesuffix("_kernel_time")
            while known and known not in parts:
                known = known.rpartition("/")[0]
            part = parts.get(known, part)
            if run >= kinds:
                seen = fastest[run % kinds]
                seen[part, name] = min(seen.get((part, name), math.inf), event["dur"] / 1000)
        elif event.get("name") == "model_run":
            run += 1
    spent: list[dict[str, float]] = [dict.fromkeys(parts.values(), 0.0) for _ in range(kinds)]
    for sums, seen in zip(spent, fastest, strict=True):
        for (part, _), took in seen.items():
            sums[part] += took
    return [{name: round(took, 3) for name, took in sums.items()} for sums in spent]
