"""Pass: codes behind DequantizeLinear as TensorRT takes them: symmetric, weight only, blocks that divide a row.

int8-dynamic becomes weight-only int8: TensorRT rounds activations with constant scales only, and a bundle holds none.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.graph import initializer
from fstq_engines.tensorrt.emit import FLOATS

SMALLEST_BLOCK = 16


class Weights(InPlacePass):
    """``changed`` counts weights whose blocks were made smaller, ``widened`` those that had to become plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = self.widened = 0

    def call(self, model: ir.Model) -> PassResult:
        for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                raise PreconditionError(f"{node.name} has a zero point; TensorRT takes symmetric weights only")
            block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
            codes = node.inputs[0]
            tensor = codes.const_value if codes is not None else None
            if block and tensor is not None and tensor.numpy().shape[1] % block:
                self._divide(model.graph, node, tensor, block)
        return PassResult(model, bool(self.changed + self.widened))

    def _divide(self, graph: ir.Graph, node: ir.Node, codes: ir.TensorProtocol, block: int) -> None:
        """Blocks that divide the row, each with the scale of the one it was part of: the same numbers."""
        value, stored = node.inputs[1], stored_scales(node)
        producer = value.producer() if value is not None else None
        tensor = stored.const_value if stored is not None else None
        if value is None or stored is None or tensor is None or node.attributes["axis"].as_int() != 1:
            raise PreconditionError(
                f"{node.name}: blocks of {block} do not divide {codes.shape}, and scales are not known"
            )
        columns = codes.numpy().shape[1]
        smaller = math.gcd(columns, block)
        if smaller >= SMALLEST_BLOCK:
            scales = np.repeat(tensor.numpy(), block // smaller, axis=1)[:, : columns // smaller]
            made = initializer(graph, f"{stored.name}.blocks_{smaller}", np.ascontiguousarray(scales))
            if producer is not None and producer.op_type == "Cast":
                cast = ir.node("Cast", [made], {"to": producer.attributes["to"].as_int()}, name=f"{node.name}/scales")
                cast.outputs[0].type = value.type
                graph.insert_before(node, cast)
                made = cast.outputs[0]
            node.replace_input_with(1, made)
            node.attributes["block_size"] = ir.AttrInt64("block_size", smaller)
            self.changed += 1
            return
        kind = value.dtype or ir.DataType.FLOAT
        scales = np.repeat(tensor.numpy().astype(np.float32), block, axis=1)[:, :columns]
        numbers = (codes.numpy().astype(np.float32) * scales).astype(FLOATS[kind])
        plain = initializer(graph, f"{codes.name}.numbers.{kind.name.lower()}", numbers)
        ir.convenience.replace_all_uses_with(node.outputs[0], plain)
        graph.remove(node, safe=True)
        self.widened += 1


def stored_scales(node: ir.Node) -> ir.Value | None:
    """What a DequantizeLinear's scales are before a Cast."""
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
