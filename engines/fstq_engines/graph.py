"""What the lowering passes share: initializers by name. Knows onnx-ir, no backend."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """An initializer of that name and content; the one that is there already, where there is one."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
    return graph.initializers[name]
