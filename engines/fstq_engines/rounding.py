"""Pass that rounds inputs of layers as their kernels will, with standard operators, in the bundle's own graph.

An engine cannot be expected to agree with its bundle better than this graph does: how far that is away from the
bundle's says how far the engine may be.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fstq_engines.codes import LEVELS, TINY
from fstq_engines.graph import initializer
from fstq_engines.quantized import layers


class RoundedInputs(InPlacePass):
    """Insert the rounding before each layer that would be lowered; ``changed`` counts these layers."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = 0

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        done: dict[tuple[ir.Value | None, int], ir.Value] = {}
        for layer in layers(graph):
            if not layer.rounded:
                continue
            given, columns = layer.node.inputs[0], layer.weight.shape[1]
            key = given, min(layer.rounded, columns)
            if key not in done:
                tape = ir.tape.Tape()
                done[key] = _round(graph, tape, given, columns, key[1])
                graph.insert_before(layer.node, tape.nodes)
            layer.node.replace_input_with(0, done[key])
            self.changed += 1
        return PassResult(model, bool(self.changed))


def _round(graph: ir.Graph, tape: ir.tape.Tape, given: ir.Value | None, columns: int, block: int) -> ir.Value:
    """(..., columns) -> the same in multiples of a 127th of each block's largest number."""

    def constant(*numbers: int) -> ir.Value:
        return initializer(graph, f"fstq/rounded/{numbers}", np.array(numbers, np.int64))

    def number(value: float) -> ir.Value:
        return initializer(graph, f"fstq/rounded/{value}", np.array(value, np.float32))

    last = constant(-1)
    count = -(-columns // block)
    shape = tape.op("Shape", [given])
    padded = tape.op("Pad", [given, constant(0, count * block - columns), number(0.0), last])
    rows = tape.op("Reshape", [padded, constant(-1, count, block)])
    largest = tape.op("ReduceMax", [tape.op("Abs", [rows]), last], {"keepdims": 1})
    steps = tape.op("Div", [tape.op("Max", [largest, number(TINY)]), number(LEVELS)])
    whole = tape.op("Mul", [tape.op("Round", [tape.op("Div", [rows, steps])]), steps])
    wide = tape.op("Reshape", [whole, constant(-1, count * block)])
    narrow = tape.op("Slice", [wide, constant(0), constant(columns), last])
    return tape.op("Reshape", [narrow, shape])
