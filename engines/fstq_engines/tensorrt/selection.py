"""Passes: token selection without TopK, and with shapes that TensorRT knows before it computes scores.

TensorRT's TopK takes K <= 3840, and its output shapes may not depend on computed numbers. So

- sorting counts, for each number, those that come before it, and scatters it there (:class:`RankSort`): exact, ties in
  order of their columns as in TopK, no limit; S x S comparisons, as many as one attention head makes;
- how many columns stay after stage G is the *length* of a new input ``columns.G`` = 0, 1, .. (:class:`KnownColumns`).
  Rows that keep fewer see the rest as padding in front, as in a batch.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_engines.tensorrt.emit import Emit, attribute

_SCOPE = re.compile(r"fstq/prune\.(\d+)/")
INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32
STRAIGHT = {"Where", "Add", "Sub", "Neg", "Identity", "Cast"}  # have the columns of an input


class KnownColumns(InPlacePass):
    """The columns that stay after a stage are as many as ``columns.G`` has."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        changed = False
        for node in list(graph):
            match = _SCOPE.match(node.name or "")
            if match is None or node.op_type != "TopK" or attribute(node, "largest", 1):
                continue
            group, most = int(match[1]), node.inputs[1]
            producer = most.producer() if most is not None else None
            if most is None or producer is None or producer.op_type != "Min":
                raise PreconditionError(f"{node.name}: the number of kept columns is not computed as expected")
            columns = ir.Value(name=f"columns.{group}", type=ir.TensorType(INT64), shape=ir.Shape([f"columns_{group}"]))
            at = next(i for i, v in enumerate(graph.inputs) if (v.name or "").startswith("past_"))
            graph.inputs.insert(at, columns)
            emit = Emit(graph, f"fstq/trt/columns.{group}")
            size = emit("Shape", columns)
            ranges = [reader for s, _ in most.uses() if s.op_type == "Squeeze" for reader, _ in s.outputs[0].uses()]
            graph.insert_before(producer, emit.nodes)
            ir.convenience.replace_all_uses_with(most, size)
            for reader in ranges:
                if reader.op_type == "Range":
                    ir.convenience.replace_all_uses_with(reader.outputs[0], columns)
            changed = True
        for value in graph.outputs:
            if match := re.fullmatch(r"kept_indices\.(\d+)", value.name or ""):
                value.shape = ir.Shape(["batch", f"columns_{match[1]}"])
        RemoveUnusedNodesPass()(model)
        return PassResult(model, changed)


class RankSort(InPlacePass):
    """TopK of all columns (that is, sorting) by counting ranks. Raises PreconditionError for a TopK of some columns."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "TopK"]
        for number, node in enumerate(nodes):
            if not _is_whole(node):
                raise PreconditionError(
                    f"{node.name} selects some of its columns; TensorRT's TopK takes K <= 3840 only, and this lowering "
                    "sorts whole rows"
                )
            self._sort(Emit(graph, f"fstq/trt/sort.{number}"), node)
        return PassResult(model, bool(nodes))

    def _sort(self, emit: Emit, node: ir.Node) -> None:
        x = node.inputs[0]
        if x is None:
            raise PreconditionError(f"{node.name} has no input")
        size = emit("Shape", x, start=1, end=2)
        zero, one = emit.const(np.array(0, np.int64)), emit.const(np.array(1, np.int64))
        column = emit("Range", zero, emit("Squeeze", size, emit.ints(0)), one)
        mine, other = emit("Unsqueeze", x, emit.ints(2)), emit("Unsqueeze", x, emit.ints(1))
        better = emit("Greater" if attribute(node, "largest", 1) else "Less", other, mine)
        earlier = emit("Less", emit("Unsqueeze", column, emit.ints(0)), emit("Unsqueeze", column, emit.ints(1)))
        before = emit("Or", better, emit("And", emit("Equal", other, mine), earlier))
        rank = emit("ReduceSum", emit("Cast", before, to=int(INT32)), emit.ints(2), keepdims=0)
        rank = emit("Cast", rank, to=int(INT64))
        columns = emit("Expand", column, emit("Shape", x))
        order = emit("ScatterElements", columns, rank, columns, axis=1)
        values = emit("GatherElements", x, order, axis=1)
        emit.replace(node, values, order)


def _is_whole(node: ir.Node) -> bool:
    """Whether K is the number of columns: the shape of the sorted value or of one with equal columns."""
    value, count = node.inputs[:2]
    if count is None or value is None or attribute(node, "axis", -1) not in (1, -1) or not attribute(node, "sorted", 1):
        return False
    todo, seen = [value], set[ir.Value]()
    sized = count.producer()
    whole = sized.inputs[0] if sized is not None and sized.op_type == "Shape" else None
    while todo:
        found = todo.pop()
        if found in seen:
            continue
        seen.add(found)
        producer = found.producer()
        if found is whole:
            return True
        if producer is None:
            continue
        if producer.op_type == "Slice" and len(producer.inputs) > 2 and producer.inputs[2] is count:
            return True
        if producer.op_type in STRAIGHT:
            todo += [v for v in producer.inputs if v is not None]
    return False
