"""The probe as graph nodes: scores of the current tokens from layer inputs, embeddings, window attention and token ids.

Mirrors :class:`fstq_infer.fisher.probe.Probe` step by step; export verifies that both keep the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fstq_export.passes.positions import visible
from fstq_export.passes.scope import Emit
from fstq_infer.errors import UnsupportedModelError

NEGATIVE = -1e4


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that enter a stage: ids, positions (B, S) int64, valid (B, S) bool, hidden, embedded (B, S, D)."""

    ids: ir.Value
    positions: ir.Value
    valid: ir.Value
    hidden: ir.Value
    embedded: ir.Value


def window_attention(emit: Emit, attention: ir.Node, tokens: Tokens, queries: int, sliding: int | None) -> ir.Value:
    """(B, H, Q, S) weights of the last Q queries over the current tokens.

    From the inputs of an Attention node, (B, S, heads * d) each. sliding: the layer's sliding window, or None.
    """
    query, key = attention.inputs[0], attention.inputs[1]
    past = attention.inputs[4] if len(attention.inputs) > 4 else None
    attributes = attention.attributes
    width = past.shape[3] if past is not None and past.shape is not None else None
    if query is None or key is None or not isinstance(width, int) or "q_num_heads" not in attributes:
        raise UnsupportedModelError(
            f"{attention.name}: expected queries of shape (batch, tokens, heads * width) and a key cache"
        )
    heads, groups = attributes["q_num_heads"].as_int(), attributes["kv_num_heads"].as_int()
    scale = attributes["scale"].as_float() if "scale" in attributes else width**-0.5
    query, key = _float(emit, query), _float(emit, key)
    q = emit("Slice", query, emit.ints(-queries), emit.ints(2**62), emit.ints(1))
    q = emit("Reshape", q, emit.ints(0, -1, groups, heads // groups, width))
    q = emit("Transpose", q, perm=[0, 2, 3, 1, 4])
    q = emit("Reshape", q, emit.ints(0, groups, -1, width))
    k = emit("Transpose", emit("Reshape", key, emit.ints(0, -1, groups, width)), perm=[0, 2, 3, 1])
    logits = emit("Mul", emit("MatMul", q, k), emit.const(np.array(scale, np.float32)))
    if "softcap" in attributes and (cap := attributes["softcap"].as_float()):
        capped = emit("Tanh", emit("Div", logits, emit.const(np.array(cap, np.float32))))
        logits = emit("Mul", capped, emit.const(np.array(cap, np.float32)))
    last = emit("Slice", tokens.positions, emit.ints(-queries), emit.ints(2**62), emit.ints(1))
    seen = emit("Unsqueeze", visible(emit, last, tokens.positions, sliding), emit.ints(1))
    rows = emit("Shape", last, start=1, end=2)
    columns = emit("Shape", tokens.positions, start=1, end=2)
    batch = emit("Shape", tokens.positions, start=0, end=1)
    logits = emit("Reshape", logits, emit("Concat", batch, emit.ints(heads), rows, columns, axis=0))
    logits = emit("Where", seen, logits, emit.const(np.array(-1e9, np.float32)))
    return emit("Softmax", logits, axis=-1)


def asked(emit: Emit, tokens: Tokens, queries: int) -> ir.Value:
    """(B, S) bool: the question's tokens, the last ``queries`` positions; an earlier stage may have dropped some."""
    last = emit("Slice", tokens.positions, emit.ints(-1), emit.ints(2**62), emit.ints(1))
    return emit("And", tokens.valid, emit("Greater", tokens.positions, emit("Sub", last, emit.ints(queries))))


def lexical(emit: Emit, tokens: Tokens, question: ir.Value, queries: int) -> ir.Value:
    """(B, 3, S): does the question hold this token (over its count in the prompt), this bigram, this trigram.

    question: (B, S) 1 for its tokens, which are among the last ``queries``.
    """
    # 0/1 arithmetic throughout: boolean ops of that shape are slower, and shifting is a Pad.
    last = emit("Slice", tokens.ids, emit.ints(-queries), emit.ints(2**62), emit.ints(1))
    valid = _float(emit, tokens.valid)
    rows = emit("Slice", question, emit.ints(-queries), emit.ints(2**62), emit.ints(1))
    ids_column = emit("Unsqueeze", tokens.ids, emit.ints(1))
    same = _float(emit, emit("Equal", emit("Unsqueeze", last, emit.ints(2)), ids_column))
    outside = emit("Sub", valid, question)  # the question is valid
    inside = emit("Mul", emit("Unsqueeze", rows, emit.ints(2)), emit("Unsqueeze", outside, emit.ints(1)))
    uni = emit("Mul", same, inside)

    def after(matches: ir.Value) -> ir.Value:
        """Matches moved one on in both the question and the prompt: the predecessor pair matched too."""
        moved = emit("Pad", matches, emit.ints(0, 1, 1, 0, 0, 0))
        return emit("Slice", moved, emit.ints(0, 0), emit.ints(-1, -1), emit.ints(1, 2))

    bi = emit("Mul", uni, after(uni))
    tri = emit("Mul", bi, after(bi))
    equal = _float(emit, emit("Equal", emit("Unsqueeze", tokens.ids, emit.ints(2)), ids_column))
    count = emit("ReduceSum", emit("Mul", equal, emit("Unsqueeze", valid, emit.ints(1))), emit.ints(2), keepdims=0)
    count = emit("Max", count, emit.const(np.array(1, np.float32)))
    features = [emit("Div", _amax(emit, uni), count), _amax(emit, bi), _amax(emit, tri)]
    return emit("Concat", *(emit("Unsqueeze", f, emit.ints(1)) for f in features), axis=1)


def _outside(emit: Emit, tokens: Tokens, last: int) -> ir.Value:
    """(S,) 1 for the columns before the last ``last``, else 0."""
    size = emit("Shape", tokens.ids, start=1, end=2)
    column = emit("Range", emit("Squeeze", emit.ints(0)), emit("Squeeze", size), emit("Squeeze", emit.ints(1)))
    return _float(emit, emit("Less", column, emit("Sub", size, emit.ints(last))))


def _amax(emit: Emit, x: ir.Value) -> ir.Value:
    return emit("ReduceMax", x, emit.ints(1), keepdims=0)


def _float(emit: Emit, x: ir.Value) -> ir.Value:
    return x if x.dtype == ir.DataType.FLOAT else emit("Cast", x, to=int(ir.DataType.FLOAT))


def _rms(emit: Emit, x: ir.Value, width: int) -> ir.Value:
    return emit("RMSNormalization", _float(emit, x), emit.const(np.ones(width, np.float32)), axis=-1, epsilon=1e-6)


def graph_weights(weights: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Weights of a probe, from ``Probe.arrays()``, as a graph holds them behind ``fstq.probe.STAGE.``; no span."""
    found = {name: array for name, array in weights.items() if name.partition(".")[0] not in ("query", "key", "span")}
    found["linear.matrix"] = np.ascontiguousarray(found.pop("linear.weight").T)
    for name in ("query", "key"):
        matrix = weights[f"{name}.weight"]
        found[f"{name}.matrix"] = np.ascontiguousarray(matrix.reshape(-1, matrix.shape[2]).T)
        found[f"{name}.bias"] = weights[f"{name}.bias"].reshape(-1)
    return found


def probe_scores(
    emit: Emit,
    prefix: str,
    weights: Mapping[str, NDArray[np.float32]],
    tokens: Tokens,
    attention: ir.Node,
    queries: int,
    window: int,
    sliding: int | None,
) -> ir.Value:
    """(B, S) float32 scores of the current tokens. weights: ``Probe.arrays()``; queries, window: the probe's."""

    held = graph_weights(weights) | {"span": weights["span"]}

    def weight(name: str) -> ir.Value:
        return emit.weight(f"{prefix}.{name}", held[name])

    heads, rank, double = weights["query.weight"].shape
    width = double // 2
    x = emit("Concat", _rms(emit, tokens.hidden, width), _rms(emit, tokens.embedded, width), axis=-1)
    valid = _float(emit, tokens.valid)
    question = _float(emit, asked(emit, tokens, queries))
    rows = emit("Slice", question, emit.ints(-queries), emit.ints(2**62), emit.ints(1))

    def project(name: str, states: ir.Value) -> ir.Value:
        """(B, n, 2D) -> (B, heads, n, rank)."""
        flat = emit("Add", emit("MatMul", states, weight(f"{name}.matrix")), weight(f"{name}.bias"))
        return emit("Transpose", emit("Reshape", flat, emit.ints(0, -1, heads, rank)), perm=[0, 2, 1, 3])

    q = project("query", emit("Slice", x, emit.ints(-queries), emit.ints(2**62), emit.ints(1)))
    k = project("key", x)
    match = emit("MatMul", q, emit("Transpose", k, perm=[0, 1, 3, 2]))
    match = emit("Mul", match, emit.const(np.array(rank**-0.5, np.float32)))
    rows = emit("Unsqueeze", rows, emit.ints(1, 3))
    one = emit.const(np.array(1, np.float32))
    match = emit("Add", match, emit("Mul", emit("Sub", rows, one), emit.const(np.array(-NEGATIVE, np.float32))))
    best = emit("ReduceMax", match, emit.ints(2), keepdims=0)
    total = emit("ReduceLogSumExp", emit("Sub", match, emit("Unsqueeze", best, emit.ints(2))), emit.ints(2), keepdims=0)
    linear = emit("Add", emit("MatMul", x, weight("linear.matrix")), weight("linear.bias"))
    weights_seen = emit("Mul", window_attention(emit, attention, tokens, queries, sliding), rows)
    rows_seen = emit("ReduceSum", rows, emit.ints(2), keepdims=0)
    tiny = emit.const(np.array(1e-6, np.float32))
    mean = emit("Div", emit("ReduceSum", weights_seen, emit.ints(2), keepdims=0), rows_seen)
    peak = emit("ReduceMax", weights_seen, emit.ints(2), keepdims=0)
    features = emit(
        "Concat",
        best,
        emit("Add", best, total),
        emit("Transpose", linear, perm=[0, 2, 1]),
        emit("Log", emit("Add", mean, tiny)),
        emit("Log", emit("Add", peak, tiny)),
        lexical(emit, tokens, question, queries),
        axis=1,
    )
    mask = emit("Unsqueeze", valid, emit.ints(1))

    def conv(name: str, states: ir.Value) -> ir.Value:
        kernel = int(weights[f"{name}.weight"].shape[2])
        parts = weight(f"{name}.weight"), weight(f"{name}.bias")
        return emit("Conv", states, *parts, pads=[kernel // 2, kernel // 2], kernel_shape=[kernel])

    features = emit("Mul", features, mask)
    first = emit("Mul", emit("Gelu", conv("conv1", features)), mask)
    second = emit("Mul", emit("Add", first, emit("Gelu", conv("conv2", first))), mask)
    scores = emit("Add", conv("conv3", second), conv("skip", features))
    span = weights["span"].shape[2]
    if span > 1:
        free = emit("Mul", mask, _outside(emit, tokens, window))
        total = emit("ReduceSum", emit("Mul", scores, free), emit.ints(2))
        mean = emit("Div", total, emit("Max", emit("ReduceSum", free, emit.ints(2)), one))
        above = emit("Mul", emit("Sub", scores, mean), free)
        scores = emit("Conv", above, weight("span"), pads=[span // 2, span // 2], kernel_shape=[span])
    return emit("Squeeze", scores, emit.ints(1))
