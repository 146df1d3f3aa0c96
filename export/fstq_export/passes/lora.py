"""Pass: low-rank branches beside linear layers, their matrices inputs of the graph (docs/bundle-format.md, `lora.*`).

A branch reads what its layer reads and is added to what the layer gives, before the bias: it does not matter how the
weight is stored, nor how many rows a pruning stage has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_export.passes.scope import Emit, layer_of
from fstq_infer.adapters.ports import SCOPE, Linear


def linear_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """name -> MatMul of a decoder layer with a weight of its own, in the graph's order; names as in :class:`Linear`."""
    found: dict[str, ir.Node] = {}
    for node in graph:
        layer, weight = layer_of(node), node.inputs[1] if node.op_type == "MatMul" else None
        if layer is None or weight is None or not weight.is_initializer():
            continue
        if weight.shape is None or len(weight.shape) != 2:
            continue
        parts = (node.name or "").split("/")
        start = next(i for i, part in enumerate(parts) if part.rpartition(".")[2] == str(layer))
        found[".".join([str(layer), *parts[start + 1 : -1]])] = node
    return found


class LoraInputs(InPlacePass):
    """Give linear layers inputs ``lora.NAME.A`` (adapters, inputs, rank) and ``lora.NAME.B`` (adapters, rank, outputs).

    Runs before weights become codes. linears: which, as :func:`fstq_export.linears.find` has found them. probes: names
    of weights that adapters may bring their own of; they become inputs with a default (ONNX: an initializer and an
    input of one name).
    """

    def __init__(self, linears: Sequence[Linear], probes: Sequence[str] = ()) -> None:
        super().__init__()
        self.linears, self.probes = linears, probes

    def requires(self, model: ir.Model) -> None:
        missing = {linear.name for linear in self.linears} - linear_nodes(model.graph).keys()
        if missing:
            raise PreconditionError(f"the graph has no linear layer {min(missing)}")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes = linear_nodes(graph)
        at = next(i for i, value in enumerate(graph.inputs) if (value.name or "").startswith("past_"))
        for linear in self.linears:
            node = nodes[linear.name]
            weight, out = node.inputs[1], node.outputs[0]
            rank, uses = f"rank.{linear.name}", list(out.uses())
            kind = ir.TensorType(weight.dtype if weight is not None and weight.dtype else ir.DataType.FLOAT)
            shapes: list[list[int | str]] = [["adapters", linear.inputs, rank], ["adapters", rank, linear.outputs]]
            sides = [
                ir.Value(name=name, type=kind, shape=ir.Shape(shape))
                for name, shape in zip(linear.ports, shapes, strict=True)
            ]
            for side in sides:
                graph.inputs.insert(at, side)
                at += 1
            emit = Emit(graph, f"{(node.name or '').rpartition('/')[0]}/{SCOPE}")
            added = emit("Add", out, emit("MatMul", emit("MatMul", node.inputs[0], sides[0]), sides[1]))
            added.type, added.shape = out.type, out.shape
            for use in uses:
                use.node.replace_input_with(use.idx, added)
            graph.insert_after(node, emit.nodes)
        for name in self.probes:
            graph.inputs.append(graph.initializers[name])
        return PassResult(model, bool(self.linears))
