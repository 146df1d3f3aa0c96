"""Pass for ONNX Runtime: keys, values and positions are written in place instead of being copied at each call.

Concatenation of past and new becomes TensorScatter (opset 24) into a buffer that is graph input and output at once; a
new input ``past_lengths`` (groups,) says where each group's free columns begin. Masks need no change: they come from
positions, and those of free columns are -1. Heads are apart then, and columns known to be in order: see
:mod:`fstq_engines.grouped_queries` and :mod:`fstq_engines.causal_blocks`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.causal_blocks import CausalBlocks
from fstq_engines.graph import initializer
from fstq_infer.runtime.ort_caches import LENGTHS

OPSET = 24
PLACES = {"key": 4, "value": 5}  # inputs of Attention
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class StaticCache(InPlacePass):
    """borders: first layer of each group but the first, that is, the layers of the pruning stages."""

    def __init__(self, borders: Sequence[int]) -> None:
        super().__init__()
        self.borders = borders

    def requires(self, model: ir.Model) -> None:
        names = {value.name for value in model.graph.inputs}
        missing = [n for g in range(len(self.borders) + 1) if (n := f"past_positions.{g}") not in names]
        if missing or LENGTHS in names:
            raise PreconditionError(f"a graph of contract 1 is needed; {missing or LENGTHS} is amiss")
        outputs = {value.name: value for value in model.graph.outputs}
        for group in range(len(self.borders) + 1):
            concat = outputs[f"present_positions.{group}"].producer()
            if concat is None or concat.op_type != "Concat":
                raise PreconditionError(
                    f"present_positions.{group} is made by {concat and concat.op_type}, expected a Concat"
                )
        for value in model.graph.inputs:
            match = _PAST.fullmatch(str(value.name))
            if match is None:
                continue
            readers, place = list(value.uses()), PLACES[match.group(2)]
            if len(readers) != 1 or readers[0][0].op_type != "Attention" or readers[0][1] != place:
                found = ", ".join(sorted({node.op_type for node, _ in readers})) or "nothing"
                raise PreconditionError(
                    f"{value.name} is read by {found}, expected one Attention, as its input {place}"
                )

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        model.opset_imports[""] = max(OPSET, model.opset_imports[""])
        groups = len(self.borders) + 1
        lengths = ir.Value(name=LENGTHS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([groups]))
        tape = ir.tape.Tape()
        rows = tape.op("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
        before, at = [], []
        for group in range(groups):
            before.append(tape.op("Slice", [lengths, _constant(graph, group), _constant(graph, group + 1)]))
            at.append(tape.op("Expand", [before[group], rows]))
        graph.insert_before(graph[0], tape.nodes)
        first = next(i for i, value in enumerate(graph.inputs) if (value.name or "").startswith("past_"))
        graph.inputs.insert(first, lengths)
        outputs = {value.name: value for value in graph.outputs}
        for group in range(groups):
            self._positions(graph, group, at[group], outputs[f"present_positions.{group}"])
        cached = (value for value in graph.inputs if _PAST.fullmatch(str(value.name)))
        blocks = CausalBlocks(graph, all(value.dtype == ir.DataType.FLOAT for value in cached))
        for node in [node for node in graph if node.op_type == "Attention" and _cached(node) is not None]:
            self._attention(graph, node, before, at, blocks)
        return PassResult(model, True)

    def _positions(self, graph: ir.Graph, group: int, at: ir.Value, present: ir.Value) -> None:
        concat = present.producer()
        past = None if concat is None else concat.inputs[0]
        if concat is None or past is None:
            raise PreconditionError(f"{present.name} is not made of what was there and what is new")
        tape = ir.tape.Tape()
        made = tape.op("TensorScatter", [*concat.inputs, at], {"axis": 1})
        ir.convenience.replace_nodes_and_values(graph, concat, [concat], tape.nodes, [present], [made])
        for value in (past, made):
            value.shape = ir.Shape(["batch", f"room_{group}"])

    def _attention(
        self,
        graph: ir.Graph,
        node: ir.Node,
        before: Sequence[ir.Value],
        at: Sequence[ir.Value],
        blocks: CausalBlocks,
    ) -> None:
        query, key, value, mask, past_key, past_value = node.inputs[:6]
        match = _cached(node)
        if match is None or past_key is None or past_value is None:
            raise PreconditionError(f"{node.name} does not read its past keys and values from the graph's inputs")
        group = sum(int(match.group(1)) >= border for border in self.borders)
        tape, attributes = ir.tape.Tape(), dict(node.attributes)
        heads = [attributes.pop(name).as_int() for name in ("q_num_heads", "kv_num_heads") if name in attributes]
        states = [query, key, value]
        if heads:
            counts = [heads[0], heads[-1], heads[-1]]
            states = [_split(graph, tape, state, count) for state, count in zip(states, counts, strict=True)]
        made = [
            tape.op("TensorScatter", [past, state, at[group]], {"axis": 2})
            for past, state in zip((past_key, past_value), states[1:], strict=True)
        ]
        known = (heads[0], heads[-1]) if heads else None
        given = {name: attribute.value for name, attribute in attributes.items()}
        name = f"fstq/attention/{match.group(1)}"
        out = blocks.attention(tape, name, [states[0], *made], mask, before[group], known, given)
        if heads:
            out = tape.op("Reshape", [tape.op("Transpose", [out], {"perm": [0, 2, 1, 3]}), _constant(graph, 0, 0, -1)])
        shape = past_key.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs[:3], [out, *made])
        for past, present in zip((past_key, past_value), made, strict=True):
            if shape is not None:
                past.shape = present.shape = ir.Shape([f"room_{group}" if i == 2 else d for i, d in enumerate(shape)])


def _cached(node: ir.Node) -> re.Match[str] | None:
    """Layer and part of the past keys that an Attention node reads, where they are the graph's inputs."""
    past = node.inputs[4] if len(node.inputs) > 5 else None
    return _PAST.fullmatch(str(past.name)) if past is not None else None


def probe_model() -> bytes:
    """A model with nothing but a TensorScatter: a backend that cannot load it cannot write caches in place."""
    kinds = {"past": ir.DataType.FLOAT, "new": ir.DataType.FLOAT, "at": ir.DataType.INT64}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(["b"] if name == "at" else ["b", 1, name, 1]))
        for name, kind in kinds.items()
    ]
    node = ir.node("TensorScatter", inputs, {"axis": 2})
    (made,) = node.outputs
    made.name, made.type, made.shape = "present", inputs[0].type, inputs[0].shape
    graph = ir.Graph(inputs, [made], nodes=[node], opset_imports={"": OPSET}, name="probe")
    serialized: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return serialized


def _constant(graph: ir.Graph, *numbers: int) -> ir.Value:
    """A 1-D int64 initializer; equal ones are shared."""
    return initializer(graph, f"fstq/static/{numbers}", np.array(numbers, np.int64))


def _split(graph: ir.Graph, tape: ir.tape.Tape, state: ir.Value | None, heads: int) -> ir.Value:
    """(B, S, heads x size) -> (B, heads, S, size)."""
    apart = tape.op("Reshape", [state, _constant(graph, 0, 0, heads, -1)])
    return tape.op("Transpose", [apart], {"perm": [0, 2, 1, 3]})
