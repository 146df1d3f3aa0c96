"""Pass: logits of the last token only. Prefill needs no others, and the head is often the largest matrix."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fstq_export.passes.scope import Emit, attention_nodes, crossing, layer_of


class LastTokenLogits(InPlacePass):
    """Slice the residual to its last column before the final norm: ``logits`` becomes (batch, 1, vocab)."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        residual = crossing(graph, len(attention_nodes(graph))).residual
        tail = [(node, i) for node, i in residual.uses() if layer_of(node) is None]
        emit = Emit(graph, "fstq/last_token")
        last = emit("Slice", residual, emit.ints(-1), emit.ints(2**62), emit.ints(1))
        readers = {node for node, _ in tail}
        graph.insert_before(next(node for node in graph if node in readers), emit.nodes)
        for node, i in tail:
            node.replace_input_with(i, last)
        shortened = {last}
        for node in graph:
            if layer_of(node) is None and any(value in shortened for value in node.inputs):
                for value in node.outputs:
                    shortened.add(value)
                    if value not in graph.outputs:
                        value.shape = None  # stale: one column from here on
        logits = next(v for v in graph.outputs if v.name == "logits")
        vocabulary = logits.shape[-1] if logits.shape is not None else None
        logits.shape = ir.Shape(["batch", 1, vocabulary])
        return PassResult(model, True)
