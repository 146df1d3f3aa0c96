"""Running a written graph piece by piece: embedding, each decoder layer, each pruning stage, head.

One small ONNX Runtime session at a time, weights mapped from the file they were written to: memory stays near the
largest piece, and a wrong layer is found by name. The engine's own parity check covers the whole graph at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from fstq_export.passes.scope import OURS, attention_nodes, layer_of

Array = NDArray[np.generic]
HEAD, TAIL = "embedding", "head"
UNPACKING = ("Cast", "DequantizeLinear", "Transpose")


class SegmentError(RuntimeError):
    """ONNX Runtime cannot load or run a piece; the message names it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of nodes; ``label`` is 'embedding', 'layer N', 'stage N' or 'head'.

    residual: name of the one output that a decoder layer hands on to the next, None elsewhere.
    """

    label: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    residual: str | None = None


def split(graph: ir.Graph) -> list[Segment]:
    """Segments in the order they run."""
    labels: dict[ir.Node, str] = {}
    for node in graph:
        layer = layer_of(node)
        name = node.name or ""
        if layer is not None:
            labels[node] = f"layer {layer}"
        elif name.startswith(f"{OURS}prune."):
            labels[node] = "stage " + name.removeprefix(f"{OURS}prune.").partition("/")[0]
        else:
            parents = (labels.get(p, HEAD) for v in node.inputs if v is not None and (p := v.producer()) is not None)
            labels[node] = HEAD if all(parent == HEAD for parent in parents) else TAIL
    for node in reversed(list(labels)):  # what only unpacks a weight belongs to the piece that reads it
        fed = [v.producer() for v in node.inputs if v is not None and not v.is_initializer()]
        if node.op_type in UNPACKING and all(parent is not None and parent.op_type in UNPACKING for parent in fed):
            readers = {labels[use.node] for value in node.outputs for use in value.uses()}
            labels[node] = readers.pop() if len(readers) == 1 else labels[node]
    order = list(dict.fromkeys([HEAD, *labels.values()]))
    order = [label for label in order if label != TAIL] + [TAIL]
    outputs = set(graph.outputs)
    probed = {value for node in attention_nodes(graph).values() for value in node.inputs[:2]}  # stages read them too
    segments = []
    for label in order:
        nodes = tuple(node for node, mine in labels.items() if mine == label)
        inside = {value for node in nodes for value in node.outputs}
        reads: dict[ir.Value, None] = {}
        for node in nodes:
            for value in node.inputs:
                if value is not None and value not in inside and not value.is_initializer():
                    reads[value] = None
        gives = [v for v in inside if v in outputs or any(labels[use.node] != label for use in v.uses())]
        on = [v.name for v in gives if v not in outputs and v not in probed]
        residual = on[0] if label.startswith("layer ") and len(on) == 1 else None
        segments.append(Segment(label, nodes, tuple(reads), tuple(sorted(gives, key=lambda v: str(v.name))), residual))
    return segments


def _cached(name: str) -> str | None:
    """The output that feeds this input at the next call."""
    if name.startswith("past_key_values."):
        return name.replace("past_key_values", "present", 1)
    return name.replace("past_", "present_", 1) if name.startswith("past_positions.") else None


def run(
    folder: Path,
    model: str,
    calls: Sequence[Mapping[str, Array]],
    replaced: Mapping[str, Array] | None = None,
) -> Iterator[tuple[Segment, list[dict[str, Array]]]]:
    """Run consecutive calls of one cache through all segments; yields (segment, outputs of each call) as they finish.

    calls: graph inputs by name, without the cache. The caches start empty. replaced: weights that an adapter brings.
    Raises SegmentError.
    """
    loaded = ir.load(folder / model)
    for name, array in (replaced or {}).items():
        loaded.graph.initializers[name].const_value = ir.tensor(array, name=name)
    for value in [value for value in loaded.graph.inputs if value.is_initializer()]:
        loaded.graph.inputs.remove(value)
    ShapeInferencePass()(loaded)  # a piece's inputs need their types
    segments = split(loaded.graph)
    needed = [{str(v.name) for v in segment.inputs} for segment in segments]
    known: list[dict[str, Array]] = [dict(call) for call in calls]
    batch = len(next(iter(calls[0].values())))
    for number, segment in enumerate(segments):
        try:
            results = _run_one(_session(folder, loaded, segment), known, batch)
        except MemoryError:
            raise
        except Exception as error:  # ONNX Runtime's own errors share no base class
            raise SegmentError(f"ONNX Runtime cannot run the written graph's {segment.label}: {error}") from error
        yield segment, results
        later = set().union(*needed[number + 1 :]) if number + 1 < len(segments) else set()
        for values, outputs in zip(known, results, strict=True):
            values.update({name: array for name, array in outputs.items() if name in later})
            for name in [name for name in values if name not in later]:
                del values[name]


def _run_one(session: ort.InferenceSession, calls: Sequence[Mapping[str, Array]], batch: int) -> list[dict[str, Array]]:
    """Outputs of consecutive calls of one segment."""
    shapes = {i.name: (i.shape, i.type) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    cache = {name: _empty(batch, *shapes[name]) for name in shapes if _cached(name)}
    results = []
    for values in calls:
        feeds = {name: cache[name] if name in cache else values[name] for name in shapes}
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        cache = {name: outputs[str(_cached(name))] for name in cache}
        results.append(outputs)
    return results


def _empty(batch: int, shape: list[int | str], kind: str) -> Array:
    dtype = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}[kind]
    return np.zeros([batch if i == 0 else 0 if isinstance(d, str) else d for i, d in enumerate(shape)], dtype)


def _session(folder: Path, model: ir.Model, segment: Segment) -> ort.InferenceSession:
    piece = ir.convenience.extract(model.graph, list(segment.inputs), list(segment.outputs))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Codes become numbers once for all calls, and no fused kernel stands in for the operators that were written.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_cpu_mem_arena = False  # a table's numbers go back to the system when they are not needed any more
    # The piece is written beside the weights, because external data is looked up next to the graph that names it.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".segment-", suffix=".onnx") as file:
        ir.save(ir.Model(piece, ir_version=model.ir_version), file.name)
        return ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
