"""Pass: nvfp4 as TensorRT has it. E2M1 numbers, an E4M3 scale for 16 of a row, one scale for the whole matrix.

A bundle, which ONNX Runtime must run, holds the numbers as int8, twice their value, and half precision scales of four
significant bits: each is an E4M3 number times a power of two that all share, so nothing is rounded here.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.graph import initializer
from fstq_engines.quantized import METADATA
from fstq_engines.tensorrt.weights import stored_scales

NVFP4, OPSET = "nvfp4", 23  # the first opset with such numbers
LARGEST = 448.0  # of E4M3


class Float4(InPlacePass):
    """``changed`` counts the DequantizeLinear nodes that read such numbers now."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = 0

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        for node in list(graph):
            if node.op_type == "DequantizeLinear" and node.metadata_props.get(METADATA) == NVFP4:
                self._pack(graph, node)
                self.changed += 1
        return PassResult(model, bool(self.changed))

    def _pack(self, graph: ir.Graph, node: ir.Node) -> None:
        codes, stored = node.inputs[0], stored_scales(node)
        tensor = codes.const_value if codes is not None else None
        if codes is None or tensor is None or stored is None or stored.const_value is None:
            raise PreconditionError(f"{node.name} reads {NVFP4} codes or scales that are not constants")
        twice = tensor.numpy()
        numbers = (twice.astype(np.float32) / 2).astype(ml_dtypes.float4_e2m1fn)
        scales, whole = split(2 * stored.const_value.numpy().astype(np.float32))
        if not np.array_equal(numbers.astype(np.float32) * 2, twice):
            raise PreconditionError(f"{node.name}: {codes.name} holds codes that are no numbers of {NVFP4}")
        kind = node.outputs[0].dtype or ir.DataType.FLOAT
        inner = ir.node(
            "DequantizeLinear",
            [initializer(graph, f"{stored.name}.e4m3", scales), initializer(graph, f"{stored.name}.whole", whole)],
            name=f"{node.name}/scales",
        )
        inner.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        made = [inner]
        if kind != ir.DataType.FLOAT:
            made.append(ir.node("Cast", [inner.outputs[0]], {"to": int(kind)}, name=f"{node.name}/cast"))
            made[-1].outputs[0].type = ir.TensorType(kind)
        graph.insert_before(node, made)
        node.replace_input_with(0, initializer(graph, f"{codes.name}.e2m1", numbers))
        node.replace_input_with(1, made[-1].outputs[0])


def split(scales: NDArray[np.float32]) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """(E4M3 numbers, a power of two) whose products are the scales. Raises PreconditionError where there are none."""
    whole = np.ldexp(np.float32(1), int(np.ceil(np.log2(float(scales.max()) / LARGEST))))
    parts = (scales / whole).astype(ml_dtypes.float8_e4m3fn)
    if not np.array_equal(parts.astype(np.float32) * whole, scales):
        raise PreconditionError(
            f"scales of {NVFP4} are not E4M3 numbers times one power of two; export the model again"
        )
    return parts, np.asarray(whole, np.float32)
