"""Pass: one copy of a tied embedding. The exporter transposes it for the head, which backends fold to a second copy."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_export.passes.scope import Emit, layer_of


def _head(graph: ir.Graph) -> ir.Node | None:
    """The MatMul that makes logits."""
    matches = (n for n in graph if n.op_type == "MatMul" and layer_of(n) is None)
    return next((n for n in matches if (n.name or "").startswith("lm_head")), None)


def _table(graph: ir.Graph) -> ir.Value | None:
    """The embedding table that ``input_ids`` index."""
    gathers = (n for n in graph if n.op_type == "Gather" and n.inputs[1] is not None)
    return next((n.inputs[0] for n in gathers if n.inputs[1] is not None and n.inputs[1].name == "input_ids"), None)


class TiedHead(InPlacePass):
    """Turn ``MatMul(x, embedding^T)`` into ``Gemm(x, embedding, transB=1)`` on the embedding table itself.

    Runs after LastTokenLogits (the head sees one column). Untied models are left as they are.
    """

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tied = tied

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        head, table = _head(graph), _table(graph)
        if not self.tied or head is None or table is None or table.shape is None:
            return PassResult(model, False)
        states, weight = head.inputs
        if states is None or weight is None or weight.shape is None or weight.name is None:
            return PassResult(model, False)
        if list(weight.shape) != list(reversed(list(table.shape))):
            return PassResult(model, False)
        emit = Emit(graph, "lm_head")
        out = emit("Unsqueeze", emit("Gemm", emit("Squeeze", states, emit.ints(1)), table, transB=1), emit.ints(1))
        graph.insert_before(head, emit.nodes)
        old = head.outputs[0]
        if old in graph.outputs:
            out.name, out.shape, out.type = old.name, old.shape, old.type
            old.name = f"{old.name}.untied"
            graph.outputs[list(graph.outputs).index(old)] = out
        ir.convenience.replace_all_uses_with(old, out)
        graph.remove(head, safe=True)
        RemoveUnusedNodesPass()(model)
        if weight.name in graph.initializers and not weight.uses():
            graph.initializers.pop(weight.name)
        return PassResult(model, True)
