"""Lowered graphs in ONNX Runtime, behind the calls of graph contract 1, to be compared with the bundle's own graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from fstq_engines.graph import initializer
from fstq_engines.tensorrt.capabilities import CONSERVATIVE, PLAIN, TABLE, Capabilities
from fstq_engines.tensorrt.lowering import lower
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

Array = NDArray[Any]
KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
ROWS: dict[str, Capabilities] = {
    "decomposed": CONSERVATIVE,
    "nodes": TABLE[PLAIN][1][1],
    "cache update": TABLE[PLAIN][2][1],
}
SPARE = 7  # free columns that a cache update sees


def session(model: ir.Model, folder: Path) -> Any:
    """A session on one thread, with nothing optimised."""
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def lowered(graph: Path, row: str, borders: list[int], dtype: str = "float32", room: int = 300) -> ir.Model:
    """The graph in ``graph`` as that row of the table takes it."""
    return lower(ir.load(graph), ROWS[row], borders, "float32", dtype, room)


def widened(model: ir.Model) -> ir.Model:
    """A model in bfloat16, for which ONNX Runtime's CPU provider has few kernels, in float32: weights stay rounded."""
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == narrow:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == int(narrow):
            node.attributes["to"] = ir.AttrInt64("to", int(wide))
    made = [value for node in graph for value in node.outputs]
    for value in [*graph.inputs, *graph.initializers.values(), *made]:
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)
    return model


def unpacked(model: ir.Model) -> ir.Model:
    """The model with numbers in the place of FP4, which ONNX Runtime lacks: as ml_dtypes and NumPy make them."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "DequantizeLinear" and n.inputs[0].dtype == ir.DataType.FLOAT4E2M1]:
        codes, scales = (
            np.asarray(v, np.float32) for v in (node.inputs[0].const_value.numpy(), _scales(node.inputs[1]))
        )
        kind = node.outputs[0].dtype
        numbers = (codes * np.repeat(scales, 16, 1)).astype(kind.numpy())
        plain = initializer(graph, f"{node.inputs[0].name}.numbers", numbers)
        ir.convenience.replace_all_uses_with(node.outputs[0], plain)
        graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    return model


def _scales(value: ir.Value) -> Array:
    """Of a DequantizeLinear of scales, with or without a Cast behind it."""
    inner = value.producer()
    if inner.op_type == "Cast":
        inner = inner.inputs[0].producer()
    parts, whole = (v.const_value.numpy() for v in inner.inputs)
    assert (parts.dtype.name, whole.dtype.name, whole.shape) == ("float8_e4m3fn", "float32", ())
    return parts.astype(np.float32) * whole


@dataclass
class Bundled:
    """The bundle's graph with its cache."""

    session: Any
    cache: dict[str, Array] = field(default_factory=dict)

    def __call__(self, ids: Array, positions: Array, keep: Array) -> tuple[Array, list[Array]]:
        """(logits, kept indices of each stage)."""
        feeds = {"input_ids": ids, "position_ids": positions, "keep": keep} | self.cache
        for port in self.session.get_inputs():
            if port.name not in feeds:
                feeds[port.name] = _empty(port, len(ids), 0)
        if not keep.shape[1]:
            del feeds["keep"]
        names = [out.name for out in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(None, feeds), strict=True))
        for name in list(feeds):
            if name.startswith("past_"):
                self.cache[name] = out[
                    name.replace("past_key_values", "present").replace("past_positions", "present_positions")
                ]
        return out["logits"], [out[f"kept_indices.{i}"] for i in range(1, keep.shape[1] + 1)]


@dataclass
class Lowered:
    """A lowered graph, with the cache that its caller keeps: new columns put behind, or buffers updated in place."""

    session: Any
    room: int = 300
    cache: dict[str, Array] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def __call__(self, ids: Array, positions: Array, keep: Array) -> tuple[Array, list[Array]]:
        """(logits, kept indices of each stage)."""
        ports, batch = self.session.get_inputs(), len(ids)
        update = any(port.name.startswith("past_rows") for port in ports)
        stages = keep.shape[1]
        most = [ids.shape[1]]
        for stage in range(stages):
            most.append(most[-1] if (keep[:, stage] < 0).any() else min(most[-1], int(keep[:, stage].max())))
        self.lengths = self.lengths or [0] * (stages + 1)
        feeds: dict[str, Array] = {"input_ids": ids, "position_ids": positions}
        if stages:
            feeds["keep"] = keep
        for group, count in enumerate(most):
            if group:
                feeds[f"columns.{group}"] = np.arange(count)
            if update:
                feeds[f"past_rows.{group}"] = np.full(batch, self.lengths[group])
                known = self.cache.get(f"past_positions.{group}", np.zeros((batch, 0), np.int64))
                width = self.lengths[group] + count + SPARE
                seen = np.full((batch, width), -1)
                seen[:, : self.lengths[group]] = known[:, : self.lengths[group]]
                feeds[f"past_positions.{group}"] = seen
        for port in ports:
            if port.name not in feeds:
                feeds[port.name] = self.cache.get(port.name, _empty(port, batch, 0))
        names = [out.name for out in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(None, feeds), strict=True))
        for name, made in out.items():
            if name.startswith("present"):
                past = name.replace("present_positions", "past_positions").replace("present.", "past_key_values.")
                self.cache[past] = made
            elif name.startswith("new"):
                past = name.replace("new_positions", "past_positions").replace("new.", "past_key_values.")
                self.cache[past] = np.concatenate([feeds[past], made], axis=made.ndim // 2)
        self.lengths = [length + count for length, count in zip(self.lengths, most, strict=True)]
        return out["logits"], [out[f"kept_indices.{i}"] for i in range(1, stages + 1)]


def _empty(port: Any, batch: int, columns: int) -> Array:
    dims = [batch if i == 0 else d if isinstance(d, int) else columns for i, d in enumerate(port.shape)]
    return np.zeros(dims, KINDS[port.type])


def difference(
    bundled: Any, lower_session: Any, rows: list[Array], keep: Array, steps: int = 3, room: int = 300
) -> float:
    """Largest difference of logits over a prefill of left-padded ``rows`` and ``steps`` decoded tokens.

    In units of the logits' deviation. Asserts that the same tokens are kept.
    """
    size = max(len(row) for row in rows) - steps
    ids, positions = np.zeros((len(rows), size), np.int64), np.full((len(rows), size), -1)
    for i, row in enumerate(rows):
        n = len(row) - steps
        ids[i, size - n :], positions[i, size - n :] = row[:n], np.arange(n)
    one, two = Bundled(bundled), Lowered(lower_session, room)
    worst = 0.0
    for step in range(steps + 1):
        want, wanted = one(ids, positions, keep)
        have, found = two(ids, positions, keep)
        assert have.dtype == np.float32 and np.isfinite(have).all()
        for a, b in zip(wanted, found, strict=True):
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left[left >= 0], right[right >= 0])
        worst = max(worst, float(np.abs(want - have).max() / max(1.0, want.std())))
        if step < steps:
            at = step - steps
            ids = np.array([[row[at]] for row in rows])
            positions = np.array([[len(row) + at] for row in rows])
            keep = np.ones_like(keep)
    return worst
