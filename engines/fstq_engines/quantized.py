"""Pass for ONNX Runtime's CPU kernels: layers whose weights are integer codes compute with these codes.

A bundle stores codes behind DequantizeLinear, (outputs, inputs), blocks along the inputs or a scale for each output; a
MatMul reads them transposed. ONNX Runtime would make floating-point weights of them anew at every call. Instead:

- int4 in blocks, and int8: MatMulNBits, inputs rounded to int8 in blocks (accuracy level 4);
- int8 with dynamic inputs: DynamicQuantizeLinear and MatMulInteger, the fastest there is for many tokens;
- embeddings: rows are looked up as codes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_engines.graph import initializer

MICROSOFT = "com.microsoft"
METADATA, DYNAMIC = "fstq.format", "int8-dynamic"  # written by the exporter on each operator that reads such a weight
BYTE_BLOCK = 128  # inputs that share a scale in an int8 layer: its kernel has no scale for a whole row
INT8_INPUTS = 4  # MatMulNBits' accuracy level
Array = NDArray[Any]


class QuantizedLayers(InPlacePass):
    """Give MatMul and Gather nodes that read codes the kernels for them.

    ``changed`` counts these nodes, ``rounding`` those whose inputs are rounded to int8. Graphs that compute in half
    precision stay as they are: the kernels are for float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed = self.rounding = 0

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        rounded: dict[ir.Value | None, tuple[ir.Value, ir.Value, ir.Value]] = {}
        for node in list(graph):
            weight = _weight(graph, node)
            if weight is None:
                continue
            tape = ir.tape.Tape()
            if node.op_type == "Gather":
                out = weight.rows(tape, node.inputs[1])
            elif node.metadata_props.get(METADATA) == DYNAMIC:
                out = weight.dynamic(tape, node.inputs[0], rounded)
            else:
                out = weight.blocks(tape, node.inputs[0])
            ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [out])
            self.changed += 1
            self.rounding += node.op_type == "MatMul"
        if self.changed:
            model.opset_imports.setdefault(MICROSOFT, 1)
            RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(self.changed))


def _weight(graph: ir.Graph, node: ir.Node) -> Weight | None:
    """What a node reads through DequantizeLinear, a MatMul transposed; None where it reads something else."""
    path = {"MatMul": (1, "Transpose", 0), "Gather": (0,)}.get(node.op_type, ())
    source: ir.Node | None = node
    for step in path:
        if isinstance(step, int):
            value = source.inputs[step] if source is not None else None
            source = value.producer() if value is not None else None
        elif source is None or source.op_type != step:
            return None
    if not path or source is None or source.op_type != "DequantizeLinear" or len(source.inputs) != 2:
        return None
    (codes, _), (scales, computed) = (_stored(value) for value in source.inputs)
    if source.outputs[0].dtype not in (None, ir.DataType.FLOAT) or computed != ir.DataType.FLOAT:
        return None
    if codes is None or scales is None or len(codes.shape) != 2:
        return None
    block = source.attributes["block_size"].as_int() if "block_size" in source.attributes else 0
    return Weight(graph, str(codes.name), codes.numpy(), scales.numpy().astype(np.float32), block)


def _stored(value: ir.Value | None) -> tuple[ir.TensorProtocol | None, ir.DataType | None]:
    """An initializer's tensor and the type it is read in, which a Cast may have changed."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0].const_value, ir.DataType(producer.attributes["to"].as_int())
    return (value.const_value, value.dtype) if value is not None else (None, None)


class Weight:
    """One matrix, codes (outputs, inputs) and scales (outputs,) or (outputs, blocks of ``block`` inputs)."""

    def __init__(self, graph: ir.Graph, name: str, codes: Array, scales: Array, block: int) -> None:
        self.graph, self.name, self.codes, self.scales, self.block = graph, name, codes, scales, block
        self.bits = 4 if codes.dtype == ml_dtypes.int4 else 8

    def _constant(self, what: str, array: Array) -> ir.Value:
        return initializer(self.graph, f"{self.name}.{what}", array)

    def rows(self, tape: ir.tape.Tape, ids: ir.Value | None) -> ir.Value:
        """Gather: rows as numbers."""
        if self.bits == 4:
            inputs = [self._constant("rows", self.codes), ids, self._constant("row_scales", self.scales)]
            attributes = {"block_size": self.block, "gather_axis": 0, "quantize_axis": 1, "bits": 4}
            return tape.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
        found = tape.op("Gather", [self._constant("rows", self.codes), ids], {"axis": 0})
        scales = self._constant("row_scales", self.scales.reshape(-1, 1))
        own = tape.op("Gather", [scales, ids], {"axis": 0})
        return tape.op("Mul", [tape.op("Cast", [found], {"to": int(ir.DataType.FLOAT)}), own])

    def dynamic(
        self,
        tape: ir.tape.Tape,
        inputs: ir.Value | None,
        rounded: dict[ir.Value | None, tuple[ir.Value, ir.Value, ir.Value]],
    ) -> ir.Value:
        """Inputs rounded to 8 bits with one scale for all, once for all layers that read them."""
        if inputs not in rounded:
            made = tape.op_multi_out("DynamicQuantizeLinear", [inputs], num_outputs=3)
            rounded[inputs] = (made[0], made[1], made[2])
        codes, scale, zero = rounded[inputs]
        weight = self._constant("columns", np.ascontiguousarray(self.codes.T))
        product = tape.op("MatMulInteger", [codes, weight, zero])
        scales = tape.op("Mul", [scale, self._constant("column_scales", self.scales.reshape(-1))])
        return tape.op("Mul", [tape.op("Cast", [product], {"to": int(ir.DataType.FLOAT)}), scales])

    def blocks(self, tape: ir.tape.Tape, inputs: ir.Value | None) -> ir.Value:
        """MatMulNBits: codes packed (outputs, blocks, bytes), their zero in the middle."""
        outputs, columns = self.codes.shape
        block = self.block or BYTE_BLOCK
        count = -(-columns // block)
        codes = np.pad(self.codes.astype(np.int8), ((0, 0), (0, count * block - columns)))
        packed = (codes.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8).reshape(outputs, count, block)
        if self.bits == 4:
            packed = packed[..., ::2] | packed[..., 1::2] << 4
        scales = self.scales if self.scales.size == outputs * count else np.repeat(self.scales.reshape(-1, 1), count, 1)
        attributes = {"K": columns, "N": outputs, "bits": self.bits, "block_size": block, "accuracy_level": INT8_INPUTS}
        constants = [
            self._constant("packed", np.ascontiguousarray(packed)),
            self._constant("scales", scales.reshape(-1)),
        ]
        return tape.op("MatMulNBits", [inputs, *constants], attributes, domain=MICROSOFT)
