"""Pass for ONNX Runtime's CPU kernels: layers whose weights are integer codes compute with these codes.

A bundle stores codes behind DequantizeLinear, (outputs, inputs), blocks along the inputs or a scale for each output; a
MatMul reads them transposed. ONNX Runtime would make floating-point weights of them anew at every call. Which operators
take their place is told in :mod:`fstq_engines.codes`; a kernel that computes something else here is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_engines.codes import MICROSOFT, Rounded, Weight

METADATA, DYNAMIC = "fstq.format", "int8-dynamic"  # written by the exporter on each operator that reads such a weight
STRICT = 1e-4  # difference of a layer to the same sums in NumPy, in units of their deviation
Check = Callable[[Weight, str], float]  # (weight, "rows", "dynamic" or "blocks") -> that difference
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that computes with codes. ways: of computing it, best first."""

    node: ir.Node
    weight: Weight
    ways: tuple[str, ...]

    @property
    def rounded(self) -> int:
        """Neighbours among a token's inputs that the first way rounds with one scale; 0: inputs stay as they are."""
        return 0 if self.ways[0] == "rows" else self.weight.inputs(self.ways[0] == "dynamic")


def layers(graph: ir.Graph) -> Iterator[Layer]:
    """All nodes that read codes through DequantizeLinear and for which there are kernels; a node may be replaced."""
    for node in list(graph):
        weight = _weight(graph, node)
        if weight is not None:
            dynamic = node.metadata_props.get(METADATA) == DYNAMIC
            ways = ("rows",) if node.op_type == "Gather" else ("dynamic", "blocks") if dynamic else ("blocks",)
            yield Layer(node, weight, ways)


class QuantizedLayers(InPlacePass):
    """Give MatMul, Gemm and Gather nodes that read codes the kernels for them, if ``check`` finds that they are right.

    ``changed`` counts these nodes, ``rounding`` those whose inputs are rounded to int8, ``refused`` those that stay
    because of the check; ``worst`` is the largest difference that was let pass. Graphs that compute in half precision
    stay as they are: the kernels are for float32.
    """

    def __init__(self, check: Check = lambda _weight, _way: 0.0) -> None:
        super().__init__()
        self.check = check
        self.changed = self.rounding = self.refused = 0
        self.worst = 0.0

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        rounded: Rounded = {}
        for layer in layers(graph):
            node, weight, way = layer.node, layer.weight, self._way(layer)
            if way is None:
                self.refused += 1
                continue
            tape = ir.tape.Tape()
            if way == "rows":
                out = weight.rows(tape, node.inputs[1])
            elif way == "dynamic":
                out = weight.dynamic(tape, node.inputs[0], rounded)
            else:
                out = weight.blocks(tape, node.inputs[0])
            if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
                out = tape.op("Add", [out, node.inputs[2]])
            ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [out])
            self.changed += 1
            self.rounding += way != "rows"
        if self.changed:
            model.opset_imports.setdefault(MICROSOFT, 1)
            RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(self.changed))

    def _way(self, layer: Layer) -> str | None:
        for way in layer.ways:
            apart = self.check(layer.weight, way)
            if apart <= STRICT:
                self.worst = max(self.worst, apart)
                return way
            _log.warning(
                "%s: the kernel for %r differs by %.2g from what it should compute on this machine, so it is not used",
                layer.node.name or layer.weight.name, way, apart,
            )  # fmt: skip
        return None


def _weight(graph: ir.Graph, node: ir.Node) -> Weight | None:
    """What a node reads through DequantizeLinear, a MatMul transposed; None where it reads something else."""
    path = {"MatMul": (1, "Transpose", 0), "Gather": (0,), "Gemm": _gemm(node)}.get(node.op_type, ())
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
    if codes.dtype != (ir.DataType.INT4 if block else ir.DataType.INT8):
        return None  # fp8 and nvfp4: there are no kernels for them here
    return Weight(graph, str(codes.name), codes, scales, block)


def _gemm(node: ir.Node) -> tuple[int | str, ...]:
    """The way to the codes of a Gemm that is a MatMul and a bias; none for another."""
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    if values.get("transA", 0) or values.get("alpha", 1.0) != 1.0 or values.get("beta", 1.0) != 1.0:
        return ()
    return (1,) if values.get("transB", 0) else (1, "Transpose", 0)


def _stored(value: ir.Value | None) -> tuple[ir.TensorProtocol | None, ir.DataType | None]:
    """An initializer's tensor and the type it is read in, which a Cast may have changed."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0].const_value, ir.DataType(producer.attributes["to"].as_int())
    return (value.const_value, value.dtype) if value is not None else (None, None)
