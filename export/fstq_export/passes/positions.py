"""Pass: attention masks from key positions, so that pruned, padded and cached keys are all told apart by one rule.

A query at position q sees a key at position p when ``0 <= p <= q``, and ``q - p < window`` in a sliding-window layer.
Positions of cached keys come in as ``past_positions.G`` and go out as ``present_positions.G``; padding has position -1.
The exporter's own masks and the ``is_causal`` attribute (which backends align differently) go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_export.passes.scope import PAST, Emit, attention_nodes, int64


def visible(emit: Emit, queries: ir.Value, keys: ir.Value, window: int | None) -> ir.Value:
    """(B, Q) query and (B, K) key positions -> (B, Q, K) bool.

    A padding query counts as the row's last one: nobody reads it, but a softmax over no key at all may give NaN.
    """
    last = emit("Max", emit("ReduceMax", queries, emit.ints(1)), emit.ints(0))
    q = emit("Where", emit("Less", queries, emit.ints(0)), last, queries)
    q = emit("Unsqueeze", q, emit.ints(2))
    k = emit("Unsqueeze", keys, emit.ints(1))
    seen = emit("And", emit("GreaterOrEqual", k, emit.ints(0)), emit("LessOrEqual", k, q))
    if window is not None:
        seen = emit("And", seen, emit("Less", emit("Sub", q, k), emit.ints(window)))
    return seen


def attend_by_position(
    graph: ir.Graph, emit: Emit, group: int, positions: ir.Value, layers: Sequence[int], windows: Sequence[int | None]
) -> None:
    """Give ``layers`` masks from their group's positions; adds that group's position cache to the graph's ends."""
    past = int64(f"past_positions.{group}", ["batch", f"past_{group}"])
    graph.inputs.append(past)
    total = emit("Concat", past, positions, axis=1)
    total.name, total.dtype = f"present_positions.{group}", ir.DataType.INT64
    total.shape = ir.Shape(["batch", f"total_{group}"])
    graph.outputs.append(total)
    nodes = attention_nodes(graph)
    masks: dict[int | None, ir.Value] = {}
    for layer in layers:
        window = windows[layer]
        if window not in masks:
            masks[window] = emit("Unsqueeze", visible(emit, positions, total, window), emit.ints(1))
        nodes[layer].replace_input_with(3, masks[window])
        nodes[layer].attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


class KeyPositions(InPlacePass):
    """Replace the attention mask input by key positions (group 0) in every layer.

    windows: per layer the sliding window in tokens, or None for full attention.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__()
        self.windows = windows

    def requires(self, model: ir.Model) -> None:
        names = {value.name for value in model.graph.inputs}
        missing = {"input_ids", "position_ids", "attention_mask"} - names
        if missing:
            found = sorted(str(name) for name in names if not PAST.fullmatch(name or ""))
            raise PreconditionError(
                f"the dense graph has no input {', '.join(sorted(missing))} (positions by ALiBi, or none?); "
                f"found {', '.join(found)} and caches"
            )
        layers = len(attention_nodes(model.graph))
        if layers != len(self.windows):
            raise PreconditionError(f"{len(self.windows)} layer windows for {layers} decoder layers")

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        positions = next(v for v in graph.inputs if v.name == "position_ids")
        uses = list(positions.uses())
        emit = Emit(graph, "fstq/positions")
        clamped = emit("Max", positions, emit.const(np.array([0], np.int64)))
        for node, index in uses:
            node.replace_input_with(index, clamped)
        attend_by_position(graph, emit, 0, positions, range(len(self.windows)), self.windows)
        graph.insert_before(graph[0], emit.nodes)
        RemoveUnusedNodesPass()(model)
        mask = next(v for v in graph.inputs if v.name == "attention_mask")
        if mask.uses():
            raise PreconditionError(
                "the attention mask is read outside the Attention nodes; this model's masks are not understood"
            )
        graph.inputs.remove(mask)
        return PassResult(model, True)
