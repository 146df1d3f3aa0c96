"""Small graphs around one node each: what TensorRT's parser is known to take wrongly or to refuse."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

HALF, INT64, BOOL = ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.BOOL
USUAL = {"batch": (1, 1, 1), "s": (1, 64, 128), "t": (1, 64, 256), "p": (0, 64, 128), "n": (1, 100, 8000)}


def value(name: str, shape: list[int | str], kind: Any = HALF) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def constant(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def model(inputs: list[ir.Value], nodes: list[ir.Node], shape: list[int | str], kind: Any = HALF) -> ir.Model:
    """A model whose output is the last node's first."""
    out = nodes[-1].outputs[0]
    out.name, out.type, out.shape = "out", ir.TensorType(kind), ir.Shape(shape)
    constants = {v.name: v for n in nodes for v in n.inputs if v is not None and v.const_value is not None}
    opsets = {"": 24} | {node.domain: 1 for node in nodes if node.domain}
    graph = ir.Graph(inputs, [out], nodes=nodes, initializers=list(constants.values()), opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


def attention(*more: str, kind: Any = HALF, **attributes: Any) -> ir.Model:
    """more: further inputs by name, of mask, past and lengths."""
    known = {
        "mask": value("mask", ["batch", 1, "s", "t"], BOOL),
        "past_key": value("past_key", ["batch", 2, "p", 64], kind),
        "past_value": value("past_value", ["batch", 2, "p", 64], kind),
        "lengths": value("lengths", ["batch"], INT64),
    }
    inputs = [value("q", ["batch", 4, "s", 64], kind)]
    inputs += [value(name, ["batch", 2, "t", 64], kind) for name in ("k", "v")]
    extra = [known[name] if name in more else None for name in known]
    while extra and extra[-1] is None:
        extra.pop()
    node = ir.node("Attention", [*inputs, *extra], attributes or None)
    return model([*inputs, *(v for v in extra if v is not None)], [node], ["batch", 4, "s", 64], kind)


def topk(count: int | None) -> ir.Model:
    """count: K, None for as many as there are."""
    x = value("x", ["batch", "n"])
    nodes = [] if count else [ir.node("Shape", [x], {"start": 1, "end": 2})]
    k = constant("k", np.array([count])) if count else nodes[0].outputs[0]
    return model([x], [*nodes, ir.node("TopK", [x, k], num_outputs=2)], ["batch", count or "n"])


def dequantize(kind: Any, zero: bool = False) -> ir.Model:
    """x @ w, w in blocks of 32 along its inputs; scalar scale for 8-bit floats."""
    x, blocked = value("x", ["s", 96]), np.dtype(kind).itemsize == 1 and "float8" not in np.dtype(kind).name
    weights = [constant("w", np.ones((96, 32), kind))]
    weights.append(constant("scale", np.ones((3, 32) if blocked else (), np.float16)))
    if zero:
        weights.append(constant("zero", np.zeros((3, 32), kind)))
    node = ir.node("DequantizeLinear", weights, {"axis": 0, "block_size": 32} if blocked else None)
    return model([x], [node, ir.node("MatMul", [x, node.outputs[0]])], ["s", 32])


def contributed() -> ir.Model:
    """A layer as ONNX Runtime has it."""
    x = value("x", ["s", 64])
    weights = [constant("w", np.zeros((32, 2, 16), np.uint8)), constant("scale", np.zeros(64, np.float16))]
    attributes = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    return model([x], [ir.node("MatMulNBits", [x, *weights], attributes, domain="com.microsoft")], ["s", 32])


def nonzero() -> ir.Model:
    x = value("x", ["batch", "n"])
    return model([x], [ir.node("NonZero", [x])], [2, "found"], INT64)


# name -> (graph, what check_graph says)
TRAPS = {
    "is_causal": (lambda: attention(is_causal=1), r"is_causal .*upper-left.*explicit mask"),
    "nonpad_kv_seqlen": (lambda: attention("mask", "lengths"), r"nonpad_kv_seqlen .*dropped.*explicit mask"),
    "past_key": (lambda: attention("past_key", "past_value"), r"past_key .*refused.*Concat"),
    "softcap": (lambda: attention("mask", softcap=5.0), r"softcap .*refused.*Tanh"),
    "dynamic K": (lambda: topk(None), r"TopK .*8000 .*depends on the input.*at most 3840.*--prompt 3840"),
    "large K": (lambda: topk(5000), r"TopK .*may select 5000 .*at most 3840"),
    "NonZero": (nonzero, r"NonZero .*does not build.*CumSum"),
    "MatMulNBits": (contributed, r"com\.microsoft .*ONNX Runtime.*export again"),
    "uint4": (lambda: dequantize(ml_dtypes.uint4), r"unsigned codes .*int4 or int8.*symmetrically"),
    "zero point": (lambda: dequantize(ml_dtypes.int4, zero=True), r"zero point .*symmetric"),
    "float8": (lambda: dequantize(ml_dtypes.float8_e4m3fn), r"float8 .*not in this GPU.*int8 or int4"),
}
