"""Pass: positions of cached keys, kept in the same columns as the keys themselves.

Where keys are put together anew at each call, ``new_positions.G`` leaves the graph; where they are scattered into
buffers, positions are too, and ``present_positions.G`` does. ``past_rows.G`` (batch,) is the first free column then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.tensorrt.attention import columns
from fstq_engines.tensorrt.capabilities import Capabilities
from fstq_engines.tensorrt.emit import Emit

_PRESENT = re.compile(r"present_positions\.(\d+)")
INT64 = ir.DataType.INT64


class CachedPositions(InPlacePass):
    """borders: first layer of each group but the first."""

    def __init__(self, capable: Capabilities, borders: Sequence[int]) -> None:
        super().__init__()
        self.capable, self.groups = capable, len(borders) + 1

    def requires(self, model: ir.Model) -> None:
        names = {value.name for value in model.graph.inputs}
        if missing := [n for g in range(self.groups) if (n := f"past_positions.{g}") not in names]:
            raise PreconditionError(f"a graph of contract 1 is needed; it has no input {', '.join(missing)}")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        for index, value in enumerate(graph.outputs):
            match = _PRESENT.fullmatch(value.name or "")
            producer = value.producer()
            if match is None:
                continue
            if producer is None or producer.op_type != "Concat" or len(producer.inputs) != 2:
                raise PreconditionError(f"{value.name} is not made by a Concat of past and new positions")
            self._group(graph, int(match[1]), index, producer)
        return PassResult(model, True)

    def _group(self, graph: ir.Graph, group: int, index: int, concat: ir.Node) -> None:
        past, new = concat.inputs
        if past is None or new is None:
            raise PreconditionError(f"{concat.name} lacks an input")
        past.shape = ir.Shape(["batch", f"past_{group}"])
        emit = Emit(graph, f"fstq/trt/positions.{group}")
        shape = ir.Shape(["batch", columns(group)])
        if not self.capable.cache_update:
            out = emit("Identity", new)
            out.name, out.type, out.shape = f"new_positions.{group}", ir.TensorType(INT64), shape
            graph.insert_before(concat, emit.nodes)
            concat.outputs[0].name = f"fstq/trt/positions.{group}/all"
            graph.outputs[index] = out
            return
        rows = ir.Value(name=f"past_rows.{group}", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
        first = next(i for i, value in enumerate(graph.inputs) if (value.name or "").startswith("past_"))
        graph.inputs.insert(first, rows)
        zero, one = emit.const(np.array(0, np.int64)), emit.const(np.array(1, np.int64))
        size = emit("Squeeze", emit("Shape", new, start=1, end=2), emit.ints(0))
        at = emit("Add", emit("Unsqueeze", rows, emit.ints(1)), emit("Range", zero, size, one))
        made = emit("ScatterElements", past, at, new, axis=1)
        emit.replace(concat, made)
        made.shape = ir.Shape(["batch", f"past_{group}"])
