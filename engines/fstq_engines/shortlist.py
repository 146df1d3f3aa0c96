"""Pass for ONNX Runtime: the largest logits of each row come out beside all of them.

A sampler that wants some dozens of 150,000 logits has to read them all, when the backend has just pushed everything the
sampler needs out of the processor's caches. In the graph that costs half as much; see docs/adr/0012-shortlist.md.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.graph import initializer
from fstq_infer.runtime.ort_caches import SHORTLIST

COUNT, BLOCK, SMALLEST = 128, 64, 1 << 14  # logits that come out; in one block; in all, so that it pays


class Shortlist(InPlacePass):
    """Outputs ``shortlist.ids`` and ``shortlist.logits`` (batch, 128): the largest logits, the largest first, of equal
    ones that of the lower id.

    Logits are NaN where any of all the logits is not finite. Graphs with few logits stay as they are.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None or logits.shape is None or not isinstance(logits.shape[-1], int):
            raise PreconditionError("the graph has no output named logits with a known number of columns")
        if logits.shape[-1] < SMALLEST:
            return PassResult(model, False)
        tape = ir.tape.Tape()
        found = _largest(graph, tape, logits, logits.shape[-1])
        graph.extend(tape.nodes)
        for name, value, kind in zip(SHORTLIST, found, (ir.DataType.INT64, ir.DataType.FLOAT), strict=True):
            value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(["batch", COUNT])
            graph.outputs.append(value)
        return PassResult(model, True)


def _largest(graph: ir.Graph, tape: ir.tape.Tape, logits: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """Ids and logits. As many blocks as logits are wanted, by their largest one, hold all that is wanted."""

    def ints(*numbers: int) -> ir.Value:
        return initializer(graph, f"fstq/shortlist/{numbers}", np.array(numbers, np.int64))

    size = next((n for n in range(BLOCK, 1, -1) if width % n == 0), 1)
    rows = tape.op("Reshape", [tape.op("Cast", [logits], {"to": ir.DataType.FLOAT}), ints(0, -1, size)])
    if size * COUNT >= width or size < BLOCK // 4:
        flat = tape.op("Reshape", [rows, ints(0, -1)])
        top, ids = tape.op_multi_out("TopK", [flat, ints(COUNT)], num_outputs=2)
    else:
        peaks = tape.op("ReduceMax", [rows, ints(2)], {"keepdims": 0})
        _, found = tape.op_multi_out("TopK", [peaks, ints(COUNT)], {"sorted": 0}, num_outputs=2)
        # Blocks in their order, so that of equal logits those of lower ids come first.
        blocks, _ = tape.op_multi_out("TopK", [found, ints(COUNT)], {"largest": 0}, num_outputs=2)
        inside = tape.op("GatherND", [rows, tape.op("Unsqueeze", [blocks, ints(2)])], {"batch_dims": 1})
        flat = tape.op("Reshape", [inside, ints(0, -1)])
        top, places = tape.op_multi_out("TopK", [flat, ints(COUNT)], num_outputs=2)
        block = tape.op("Div", [places, ints(size)])
        begin = tape.op(
            "Mul", [tape.op("Sub", [tape.op("GatherElements", [blocks, block], {"axis": 1}), block]), ints(size)]
        )
        ids = tape.op("Add", [begin, places])
    # Infinity times 0 is NaN, and so is what NaN is added to.
    whole = tape.op("Mul", [tape.op("ReduceSum", [rows, ints(1, 2)], {"keepdims": 0}), _zero(graph)])
    return ids, tape.op("Add", [top, tape.op("Unsqueeze", [whole, ints(1)])])


def _zero(graph: ir.Graph) -> ir.Value:
    return initializer(graph, "fstq/shortlist/zero", np.zeros(1, np.float32))
