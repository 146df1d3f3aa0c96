"""Pass: Attention as TensorRT takes it: past and new keys put together explicitly, an explicit mask, one output.

Without an Attention node: MatMul, Softmax, MatMul over (batch, key heads, queries of all heads of a group, width), so
that grouped keys are read once. New keys and values leave the graph as ``new.L.key`` (the caller copies them behind the
past ones), or are scattered into the caller's buffers, ``present.L.key``, where TensorRT can do that in place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.tensorrt.capabilities import Capabilities
from fstq_engines.tensorrt.emit import Emit, attribute

PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
KNOWN = {"q_num_heads", "kv_num_heads", "scale", "softcap", "is_causal", "qk_matmul_output_mode", "softmax_precision"}
HIDDEN = -1e30  # logit of a key that may not be seen; in half precision its lowest number
HIDDEN_HALF = -65504.0


class LowerAttention(InPlacePass):
    """capable: what may be written. borders: first layer of each group but the first.

    room: columns of the caller's buffers, for a cache update; the first ones, as many as there are positions, are read.
    """

    def __init__(self, capable: Capabilities, borders: Sequence[int], room: int) -> None:
        super().__init__()
        self.capable, self.borders, self.room = capable, borders, room
        self._masks: dict[tuple[ir.Value, int], ir.Value] = {}

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Attention"]
        for node in nodes:
            self._lower(graph, node)
        return PassResult(model, bool(nodes))

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        query, key, value, mask, past_key, past_value = [*node.inputs, None, None, None][:6]
        match = PAST.fullmatch(str(past_key.name)) if past_key is not None else None
        if query is None or key is None or value is None or past_key is None or past_value is None or match is None:
            raise PreconditionError(f"{node.name} does not read its past keys and values from the graph's inputs")
        if mask is None or attribute(node, "is_causal", 0):
            raise PreconditionError(
                f"{node.name} leaves causality to is_causal, which TensorRT aligns upper-left: wrong while decoding. "
                "Give it an explicit mask"
            )
        if odd := set(node.attributes) - KNOWN:
            raise PreconditionError(f"{node.name} has the attribute {min(odd)}, which this lowering does not know")
        if len(node.inputs) > 6 and node.inputs[6] is not None:
            raise PreconditionError(f"{node.name} reads nonpad_kv_seqlen, which TensorRT's parser drops")
        emit = Emit(graph, f"fstq/trt/attention.{match[1]}")
        heads, groups, flat = _heads(node, query, past_key)
        states = [query, key, value]
        if flat:
            states = [_split(emit, s, n) for s, n in zip(states, (heads, groups, groups), strict=True)]
        query = states[0]
        layer = int(match[1])
        group = sum(layer >= border for border in self.borders)
        joined, made = [], []
        for past, state in zip((past_key, past_value), states[1:], strict=True):
            if self.capable.cache_update:
                at = next(v for v in graph.inputs if v.name == f"past_rows.{group}")
                made.append(emit("TensorScatter", past, state, at, axis=2))
                read = next(v for v in graph.inputs if v.name == f"past_positions.{group}")
                width = emit("Shape", read, start=1, end=2)
                joined.append(emit("Slice", made[-1], emit.ints(0), width, emit.ints(2)))
            else:
                joined.append(emit("Concat", past, state, axis=2))
                made.append(state)
        scale = attribute(node, "scale", None) or _width(past_key) ** -0.5
        cap = float(attribute(node, "softcap", 0.0))
        kind = (query.dtype or ir.DataType.FLOAT).name
        if self.capable.attends("float32" if kind == "FLOAT" else kind, _width(past_key)) and not cap:
            out = emit("Attention", query, *joined, mask, scale=float(scale))
        else:
            out = self._decomposed(emit, query, joined, mask, float(scale), cap, heads // groups, groups)
        if flat:
            out = emit("Reshape", emit("Transpose", out, perm=[0, 2, 1, 3]), emit.ints(0, 0, -1))
        shapes = [past.shape for past in (past_key, past_value)]
        emit.replace(node, out, *made)
        for present, shape, past in zip(made, shapes, (past_key, past_value), strict=True):
            part = str(past.name).rsplit(".", 1)[1]
            dims = list(shape or ())
            present.type = past.type
            if self.capable.cache_update:
                present.name = f"present.{layer}.{part}"
                past.shape = present.shape = ir.Shape([self.room if i == 2 else d for i, d in enumerate(dims)])
            else:
                present.name = f"new.{layer}.{part}"
                present.shape = ir.Shape([columns(group) if i == 2 else d for i, d in enumerate(dims)])
                past.shape = ir.Shape([f"past_{group}" if i == 2 else d for i, d in enumerate(dims)])

    def _decomposed(
        self,
        emit: Emit,
        query: ir.Value,
        joined: Sequence[ir.Value],
        mask: ir.Value,
        scale: float,
        cap: float,
        share: int,
        groups: int,
    ) -> ir.Value:
        """(B, heads, S, d). share: query heads that read the same keys."""
        kind = query.dtype or ir.DataType.FLOAT
        q = emit("Mul", query, emit.number(scale, kind))
        length = emit("Shape", query, start=2, end=3)
        if share > 1:
            q = emit(
                "Reshape", q, emit("Concat", emit.ints(0, groups, -1), emit("Shape", query, start=3, end=4), axis=0)
            )
        logits = emit("MatMul", q, emit("Transpose", joined[0], perm=[0, 1, 3, 2]))
        if cap:
            number = emit.number(cap, kind)
            logits = emit("Mul", emit("Tanh", emit("Div", logits, number)), number)
        low = emit.number(HIDDEN_HALF if kind == ir.DataType.FLOAT16 else HIDDEN, kind)
        logits = emit("Where", self._mask(emit, mask, share), logits, low)
        out = emit("MatMul", emit("Softmax", logits, axis=-1), joined[1])
        if share > 1:
            shape = emit("Concat", emit.ints(0, share * groups), length, emit.ints(-1), axis=0)
            out = emit("Reshape", out, shape)
        return out

    def _mask(self, emit: Emit, mask: ir.Value, share: int) -> ir.Value:
        """(B, 1, S, T) for each of ``share`` heads in turn: (B, 1, share * S, T); made once for all layers."""
        if share == 1:
            return mask
        if (mask, share) not in self._masks:
            own = Emit(emit.graph, f"fstq/trt/mask.{len(self._masks)}")
            self._masks[mask, share] = own("Concat", *[mask] * share, axis=2)
            producer = mask.producer()
            if producer is None:
                emit.graph.insert_before(emit.graph[0], own.nodes)
            else:
                emit.graph.insert_after(producer, own.nodes)
        return self._masks[mask, share]


def columns(group: int) -> str:
    """Name of the dimension of a call's tokens in a group of layers."""
    return f"columns_{group}" if group else "sequence"


def _heads(node: ir.Node, query: ir.Value, past: ir.Value) -> tuple[int, int, bool]:
    """Query heads, key heads, and whether inputs are (B, S, heads * d)."""
    if "q_num_heads" in node.attributes:
        return attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0), True
    shapes = [value.shape for value in (query, past)]
    counts = [shape[1] for shape in shapes if shape is not None and len(shape) == 4]
    if len(counts) == 2 and isinstance(counts[0], int) and isinstance(counts[1], int):
        return counts[0], counts[1], False
    raise PreconditionError(f"{node.name} does not say how many heads it has")


def _width(past: ir.Value) -> int:
    width = past.shape[3] if past.shape is not None else None
    if not isinstance(width, int):
        raise PreconditionError(f"{past.name} has the shape {past.shape}, expected a fixed width of a head")
    return width


def _split(emit: Emit, state: ir.Value, heads: int) -> ir.Value:
    """(B, S, heads * d) -> (B, heads, S, d)."""
    return emit("Transpose", emit("Reshape", state, emit.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])
