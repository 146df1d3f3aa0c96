"""What the passes for TensorRT share: new nodes with names and types, and the types of values that have none."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fstq_engines.graph import initializer

FLOATS = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# Operators whose output has another type than their first input.
_BOOL = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "IsNaN"}
_INT64 = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}
_SECOND = {"Where": 1, "DequantizeLinear": 1}


class Emit:
    """Emits nodes in order, to be put into the graph by :meth:`replace`; ``scope`` names them."""

    def __init__(self, graph: ir.Graph, scope: str) -> None:
        self.graph, self.scope = graph, scope
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """One node with one output."""
        name = f"{self.scope}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, list(inputs), attributes=attributes or None, name=name)
        (out,) = node.outputs
        out.name, out.type = f"{name}.0", _tensor(output_type(node, 0))
        self.nodes.append(node)
        return out

    def const(self, array: NDArray[Any]) -> ir.Value:
        """A small constant; equal ones are shared within the graph."""
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:20]
        return initializer(self.graph, f"fstq/trt/{array.dtype}{list(array.shape)}/{digest}", array)

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.const(np.array(values, np.int64))

    def number(self, value: float, kind: ir.DataType) -> ir.Value:
        """A scalar of a floating-point type."""
        return self.const(np.array(value, FLOATS[kind]))

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """The value in that type."""
        return value if value.dtype == kind else self("Cast", value, to=int(kind))

    def replace(self, node: ir.Node, *made: ir.Value) -> None:
        """Put the nodes in the place of ``node``, whose first outputs ``made`` take over."""
        old = node.outputs[: len(made)]
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], self.nodes, old, list(made))


def output_type(node: ir.Node, index: int) -> ir.DataType | None:
    """Type of an output, from those of the inputs; None where they are not known."""
    if node.op_type in _BOOL:
        return ir.DataType.BOOL
    if node.op_type in _INT64 or (node.op_type == "TopK" and index):
        return ir.DataType.INT64
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Constant", "ConstantOfShape"):
        value = node.attributes.get("value")
        return value.as_tensor().dtype if value is not None else None
    at = _SECOND.get(node.op_type, 0)
    source = node.inputs[at] if len(node.inputs) > at else None
    return source.dtype if source is not None else None


def propagate_types(graph: ir.Graph) -> None:
    """Give types to all values that have none."""
    for node in graph:
        for index, value in enumerate(node.outputs):
            if value.dtype is None:
                value.type = _tensor(output_type(node, index))


def _tensor(kind: ir.DataType | None) -> ir.TensorType | None:
    return None if kind is None else ir.TensorType(kind)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or ``default`` where the node has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value
