"""Pass: one copy of a tied embedding. The exporter writes the head as a transposed second copy of the embedding table."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_export.passes.scope import Emit, layer_of


class TiedHead(InPlacePass):
    """Turn ``MatMul(x, embedding^T)`` into ``Gemm(x, embedding, transB=1)`` on the embedding table itself.

    Runs after LastTokenLogits (the head sees one column). Untied models are left as they are.
    """

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tied = tied

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        head = next(
            (
                n
                for n in graph
                if n.op_type == "MatMul" and layer_of(n) is None and (n.name or "").startswith("lm_head")
            ),
            None,
        )
        table = next(
            (
                n.inputs[0]
                for n in graph
                if n.op_type == "Gather" and n.inputs[1] is not None and n.inputs[1].name == "input_ids"
            ),
            None,
        )
        if (
            not self.tied
            or head is None
            or table is None
            or table.shape is None
            or head.inputs[1] is None
            or head.inputs[0] is None
        ):
            return PassResult(model, False)
        weight = head.inputs[1]
        if weight.shape is None or list(weight.shape) != list(reversed(list(table.shape))):
            return PassResult(model, False)
        emit = Emit(graph, "lm_head")
        flat = emit("Squeeze", head.inputs[0], emit.ints(1))
        product = emit("Gemm", flat, table, transB=1)
        out = emit("Unsqueeze", product, emit.ints(1))
        graph.insert_before(head, emit.nodes)
        old = head.outputs[0]
        if old in graph.outputs:
            out.name, out.shape, out.dtype = old.name, old.shape, old.dtype
            old.name = f"{old.name}.untied"
            graph.outputs[list(graph.outputs).index(old)] = out
        ir.convenience.replace_all_uses_with(old, out)
        graph.remove(head, safe=True)
        RemoveUnusedNodesPass()(model)
        if weight.name in graph.initializers and not weight.uses():
            graph.initializers.pop(weight.name)
        return PassResult(model, True)
