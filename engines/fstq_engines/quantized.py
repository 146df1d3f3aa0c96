"""Pass for ONNX Runtime's CPU kernels: layers whose weights are integer codes compute with these codes.

A bundle stores codes behind DequantizeLinear, (outputs, inputs), blocks along the inputs or a scale for each output; a
MatMul reads them transposed. ONNX Runtime would make floating-point weights of them anew at every call. Which operators
take their place is told in :mod:`fstq_engines.codes`; a kernel that computes something else here is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_engines.branches import either
from fstq_engines.codes import MICROSOFT, Rounded, Weight
from fstq_engines.graph import initializer
from fstq_infer.quant.formats import FORMATS

METADATA = "fstq.format"  # written by the exporter on each operator that reads such a weight
STRICT = 1e-4  # difference of a layer to the same sums in NumPy, in units of their deviation
FEW = 8  # tokens of a row up to which a call reads int4 codes where there are int8 ones too
Check = Callable[[Weight, str], float]  # (weight, "rows", "dynamic" or "blocks") -> that difference
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that computes with codes. ways: of computing it, best first: those of Weight, or "either".

    "either": "blocks" of a few tokens, "dynamic" of many, with int8 codes made from the others.
    """

    node: ir.Node
    weight: Weight
    ways: tuple[str, ...]

    @property
    def rounded(self) -> int:
        """Neighbours among a token's inputs that the first way rounds with one scale; 0: inputs stay as they are."""
        return 0 if self.ways[0] == "rows" else self.weight.inputs(self.ways[0] != "blocks")


def layers(graph: ir.Graph) -> Iterator[Layer]:
    """All nodes that read codes through DequantizeLinear and for which there are kernels; a node may be replaced."""
    for node in list(graph):
        weight = _weight(graph, node)
        if weight is not None:
            form = FORMATS.get(node.metadata_props.get(METADATA, ""))
            ways: tuple[str, ...] = ("blocks",)
            if node.op_type == "Gather":
                ways = ("rows",)
            elif form is not None and form.inputs == 0:
                ways = ("either" if form.has_copy else "dynamic", "blocks")
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
        together: dict[ir.Value | None, list[Layer]] = {}
        for layer in layers(graph):
            node, weight, way = layer.node, layer.weight, self._way(layer)
            if way is None:
                self.refused += 1
                continue
            self.changed += 1
            self.rounding += way != "rows"
            if way == "either":
                together.setdefault(node.inputs[0], []).append(layer)
                continue
            tape = ir.tape.Tape()
            if way == "rows":
                out = weight.rows(tape, node.inputs[1])
            elif way == "dynamic":
                out = weight.dynamic(tape, node.inputs[0], rounded)
            else:
                out = weight.blocks(tape, node.inputs[0])
            _replace(graph, tape, [node], [out])
        if together:
            many = _many_tokens(graph)
            for number, (inputs, group) in enumerate(together.items()):
                _either(graph, f"fstq/either/{number}", inputs, many, group)
        if self.changed:
            model.opset_imports.setdefault(MICROSOFT, 1)
            RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(self.changed))

    def _way(self, layer: Layer) -> str | None:
        for way in layer.ways:
            if way == "either":
                apart = max(self.check(layer.weight, "blocks"), self.check(layer.weight.widened(), "dynamic"))
            else:
                apart = self.check(layer.weight, way)
            if apart <= STRICT:
                self.worst = max(self.worst, apart)
                return way
            _log.warning(
                "%s: the kernel for %r differs by %.2g from what it should compute on this machine, so it is not used",
                layer.node.name or layer.weight.name, way, apart,
            )  # fmt: skip
        return None


def _replace(graph: ir.Graph, tape: ir.tape.Tape, nodes: Sequence[ir.Node], made: Sequence[ir.Value]) -> None:
    """Put what was made, and the biases of Gemm nodes, in the place of nodes; at the first of them."""
    outputs = [
        tape.op("Add", [out, node.inputs[2]])
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None
        else out
        for node, out in zip(nodes, made, strict=True)
    ]
    old = [node.outputs[0] for node in nodes]
    ir.convenience.replace_nodes_and_values(graph, nodes[0], nodes, tape.nodes, old, outputs)


def _many_tokens(graph: ir.Graph) -> ir.Value:
    """Whether a call has more than a few tokens a row; the graph's first input is (rows, tokens, ...)."""
    tape = ir.tape.Tape()
    tokens = tape.op("Squeeze", [tape.op("Shape", [graph.inputs[0]], {"start": 1, "end": 2})])
    many = tape.op("Greater", [tokens, initializer(graph, "fstq/few", np.array(FEW, np.int64))])
    graph.insert_before(graph[0], tape.nodes)
    return many


def _either(graph: ir.Graph, name: str, inputs: ir.Value | None, many: ir.Value, group: Sequence[Layer]) -> None:
    """One choice for all layers that read the same inputs, which are rounded once."""
    tape = ir.tape.Tape()

    def wide(inner: ir.tape.Tape) -> list[ir.Value]:
        rounded: Rounded = {}
        return [layer.weight.widened().dynamic(inner, inputs, rounded) for layer in group]

    def narrow(inner: ir.tape.Tape) -> list[ir.Value]:
        return [layer.weight.blocks(inner, inputs) for layer in group]

    made = either(tape, many, name, wide, narrow)
    _replace(graph, tape, [layer.node for layer in group], made)


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
