"""Pass: token pruning. Before a stage's layer the prompt tokens that do not matter leave the decoder.

Per stage: probe scores -> sinks and window forced -> the ``keep`` best per row, ascending -> gather residual, positions
and rotary tables -> masks and a key-value cache of their own for the layers that follow. ``keep`` is a runtime input,
so one graph serves pruned prefill, dense operation (``keep = sequence``) and decoding (one token, ``keep = 1``). A
negative one asks for a share of the score mass, in millionths, and the graph counts the tokens itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_export.passes.positions import attend_by_position
from fstq_export.passes.probe import Tokens, probe_scores
from fstq_export.passes.scope import PAST, Crossing, Emit, attention_nodes, crossing, int64, layer_of
from fstq_infer.errors import UnsupportedModelError
from fstq_infer.fisher.probe import QUERIES
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import MILLION

FORCED = 1e30  # the score of tokens that always stay
_PRESENT = re.compile(r"present\.(\d+)\.(key|value)")


@dataclass(frozen=True, slots=True)
class PruneStage:
    """A stage and the probe that scores its tokens (``Probe.arrays()``), reading ``queries`` tokens as the question.

    Without a probe it goes on with the scores of the stage before.
    """

    stage: Stage
    probe: Mapping[str, NDArray[np.float32]] | None
    queries: int = QUERIES


def _choose(
    emit: Emit, scores: ir.Value, tokens: Tokens, keep: ir.Value, stage: Stage, scale: float
) -> tuple[ir.Value, ir.Value]:
    """((B, K) ascending columns that stay, (B, K) bool: counts for its row). keep: (B, 1). scale: of the scores."""
    size = emit("Shape", scores, start=1, end=2)
    zero, one = emit("Squeeze", emit.ints(0)), emit("Squeeze", emit.ints(1))
    column = emit("Range", zero, emit("Squeeze", size), one)
    tokens_in_row = emit("ReduceSum", emit("Cast", tokens.valid, to=int(ir.DataType.INT64)), emit.ints(1), keepdims=1)
    padding = emit("Sub", size, tokens_in_row)
    is_sink = emit("Less", column, emit("Add", padding, emit.ints(stage.sink)))
    is_window = emit("GreaterOrEqual", column, emit("Sub", size, emit.ints(max(1, stage.window))))
    big = emit.const(np.array(FORCED, np.float32))
    ranked = emit("Where", emit("Or", is_sink, is_window), big, scores)
    ranked = emit("Where", tokens.valid, ranked, emit("Neg", big))
    values, order = emit.multi("TopK", 2, ranked, size, axis=1, largest=1, sorted=1)
    keep = emit("Where", emit("Less", keep, emit.ints(0)), _enough(emit, values, keep, scale), keep)
    most = emit("Min", emit("Reshape", emit("ReduceMax", keep, keepdims=0), emit.ints(1)), size)
    best = emit("Slice", order, emit.ints(0), most, emit.ints(1))
    rank = emit("Range", zero, emit("Squeeze", most), one)
    counts = emit("And", emit("Less", rank, keep), emit("GatherElements", tokens.valid, best, axis=1))
    # Tokens that do not count for their row go to the front: the shorter row is left-padded like any other.
    key = emit("Where", counts, best, emit("Sub", best, size))
    key, order = emit.multi("TopK", 2, key, most, axis=1, largest=0, sorted=1)
    ascending = emit("Where", emit("Less", key, emit.ints(0)), emit("Add", key, size), key)
    return ascending, emit("GatherElements", counts, order, axis=1)


def _enough(emit: Emit, ranked: ir.Value, keep: ir.Value, scale: float) -> ir.Value:
    """(B, 1) counts as :func:`fstq_infer.fisher.select.mass_count` gives.

    ranked: (B, S) falling scores, forced tokens first and padding last. keep: (B, 1) minus millionths of the mass.
    """
    zero, huge = emit.const(np.array(0, np.float32)), emit.const(np.array(FORCED / 2, np.float32))
    forced = emit("Greater", ranked, huge)
    free = emit("And", emit("Not", forced), emit("Greater", ranked, emit("Neg", huge)))
    peak = emit("ReduceMax", emit("Where", free, ranked, emit("Neg", huge)), emit.ints(1))
    shifted = emit("Div", emit("Sub", ranked, peak), emit.const(np.array(scale, np.float32)))
    weights = emit("Where", free, emit("Exp", emit("Where", free, shifted, zero)), zero)
    before = emit("CumSum", weights, emit("Squeeze", emit.ints(1)), exclusive=1)
    millionths = emit("Cast", emit("Neg", keep), to=int(ir.DataType.FLOAT))
    share = emit("Div", millionths, emit.const(np.array(MILLION, np.float32)))
    short = emit("Less", before, emit("Mul", share, emit("ReduceSum", weights, emit.ints(1))))
    stays = emit("Or", forced, emit("And", free, short))
    return emit("ReduceSum", emit("Cast", stays, to=int(ir.DataType.INT64)), emit.ints(1))


class TokenPruning(InPlacePass):
    """Insert pruning stages into a graph that went through KeyPositions.

    stages: in layer order. windows: per layer the sliding window, or None.
    """

    def __init__(self, stages: Sequence[PruneStage], windows: Sequence[int | None]) -> None:
        super().__init__()
        self.stages, self.windows = stages, windows

    def requires(self, model: ir.Model) -> None:
        if not any(v.name == "past_positions.0" for v in model.graph.inputs):
            raise PreconditionError("TokenPruning needs a graph with past_positions.0; run KeyPositions first")
        layers = [s.stage.layer for s in self.stages]
        total = len(attention_nodes(model.graph))
        if sorted(set(layers)) != layers or (layers and not (layers[0] > 0 and layers[-1] < total)):
            raise PreconditionError(f"prune layers must rise and lie in 1..{total - 1}; found {layers}")
        if self.stages and self.stages[0].probe is None:
            raise PreconditionError("the first pruning stage has no scores to go on with; it needs a probe")

    def call(self, model: ir.Model) -> PassResult:
        if not self.stages:
            return PassResult(model, False)
        graph = model.graph
        nodes = attention_nodes(graph)
        inputs = {v.name: v for v in graph.inputs}
        keep = int64("keep", ["batch", len(self.stages)])
        graph.inputs.insert(2, keep)
        embedded = crossing(graph, 0).residual
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        origin: ir.Value | None = None
        scores: ir.Value | None = None
        columns: ir.Value | None = None
        for number, prune in enumerate(self.stages, 1):
            layer = prune.stage.layer
            border = crossing(graph, layer)
            emit = Emit(graph, f"fstq/prune.{number}")
            valid = emit("GreaterOrEqual", positions, emit.ints(0))
            tokens = Tokens(ids, positions, valid, border.residual, embedded)
            if prune.probe is None:
                scores = emit("GatherElements", scores, columns, axis=1)
            else:
                span = prune.probe["span"].shape[2]
                scores = probe_scores(
                    emit,
                    f"fstq.probe.{number}",
                    prune.probe,
                    tokens,
                    nodes[layer - 1],
                    prune.queries,
                    prune.stage.window,
                    self.windows[layer - 1],
                )
            own = emit("Slice", keep, emit.ints(number - 1), emit.ints(number), emit.ints(1))
            columns, counts = _choose(emit, scores, tokens, own, prune.stage, span)
            minus = emit.ints(-1)
            positions = emit("Where", counts, emit("GatherElements", positions, columns, axis=1), minus)
            kept = emit("GatherElements", origin, columns, axis=1) if origin is not None else columns
            origin = kept
            out = emit("Where", counts, kept, minus)
            out.name, out.dtype = f"kept_indices.{number}", ir.DataType.INT64
            out.shape = ir.Shape(["batch", f"kept_{number}"])
            graph.outputs.append(out)
            ids = emit("GatherElements", ids, columns, axis=1)
            index = emit("Unsqueeze", columns, emit.ints(2))
            embedded = emit("GatherND", embedded, index, batch_dims=1)
            moved = {border.residual: emit("GatherND", border.residual, index, batch_dims=1)}
            self._rewire(graph, emit, number, border, moved, positions)
        self._name_caches(graph)
        return PassResult(model, True)

    def _rewire(
        self,
        graph: ir.Graph,
        emit: Emit,
        number: int,
        border: Crossing,
        moved: dict[ir.Value, ir.Value],
        positions: ir.Value,
    ) -> None:
        """Make the layers from the border on read the kept tokens."""
        late = [node for node in graph if (at := layer_of(node)) is not None and at >= border.layer]
        clamped = emit("Max", positions, emit.ints(0))
        masks = {id(node.inputs[3]) for node in attention_nodes(graph).values()}
        for value in border.side:
            producer = value.producer()
            table = producer.inputs[0] if producer is not None and producer.op_type == "Gather" else None
            if table is not None and table.is_initializer():
                moved[value] = emit("Gather", table, clamped, axis=0)  # rotary cos or sin
            elif id(value) not in masks:
                made_by = producer.op_type if producer is not None else "input"
                raise UnsupportedModelError(
                    f"decoder layers from {border.layer} on read {value.name} ({made_by}), "
                    "which token pruning does not know how to shorten"
                )
        attend_by_position(graph, emit, number, positions, range(border.layer, len(self.windows)), self.windows)
        for node in late:
            for i, read in enumerate(node.inputs):
                if read is not None and read in moved:
                    node.replace_input_with(i, moved[read])
            for given in node.outputs:
                if given not in graph.outputs:
                    given.shape = None  # stale: the sequence is shorter from here on
        for node in graph:
            if layer_of(node) is None and any(value is border.residual for value in node.inputs):
                raise UnsupportedModelError(
                    f"{node.name} reads the residual before layer {border.layer}; "
                    "it would see pruned and unpruned tokens mixed"
                )
        graph.insert_before(late[0], emit.nodes)

    def _name_caches(self, graph: ir.Graph) -> None:
        """Each group's cache has its own symbolic lengths, or ONNX Runtime would reuse buffers of the wrong size."""
        borders = [s.stage.layer for s in self.stages]
        for value in [*graph.inputs, *graph.outputs]:
            for pattern, dim in ((PAST, "past"), (_PRESENT, "total")):
                match = pattern.fullmatch(value.name or "")
                if match and value.shape is not None:
                    group = sum(int(match.group(1)) >= border for border in borders)
                    value.shape = ir.Shape([f"{dim}_{group}" if i == 2 else d for i, d in enumerate(value.shape.dims)])
