"""Passes: RotaryEmbedding and RMSNormalization written with operators that every TensorRT knows; constant sums."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.graph import initializer
from fstq_engines.tensorrt.emit import Emit, attribute

FLOAT = ir.DataType.FLOAT


class DecomposeRotary(InPlacePass):
    """RotaryEmbedding (opset 23) with cos and sin of each token, (B, S, rotated / 2)."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "RotaryEmbedding" and not node.domain]
        for number, node in enumerate(nodes):
            _rotate(Emit(graph, f"fstq/trt/rotary.{number}"), node)
        return PassResult(model, bool(nodes))


def _rotate(emit: Emit, node: ir.Node) -> None:
    states, cos, sin = node.inputs[:3]
    if states is None or cos is None or sin is None or any(v is not None for v in node.inputs[3:]):
        raise PreconditionError(f"{node.name} looks up its tables by position ids; expected cos and sin of each token")
    heads = attribute(node, "num_heads", 0)
    shape = states.shape
    flat = len(shape) == 3 if shape is not None else bool(heads)
    if (flat and not heads) or (shape is not None and len(shape) not in (3, 4)):
        raise PreconditionError(f"{node.name} reads the shape {shape} with {heads} heads, expected 3 or 4 dimensions")
    axis = 2 if flat else 1  # of the heads
    x = emit("Reshape", states, emit.ints(0, 0, heads, -1)) if flat else states
    cos, sin = (emit("Unsqueeze", table, emit.ints(axis)) for table in (cos, sin))
    rotated, rest = attribute(node, "rotary_embedding_dim", 0), None
    if rotated:
        whole = x
        x = emit("Slice", whole, emit.ints(0), emit.ints(rotated), emit.ints(3))
        rest = emit("Slice", whole, emit.ints(rotated), emit.ints(2**31 - 1), emit.ints(3))
    if attribute(node, "interleaved", 0):
        end = emit.ints(2**31 - 1)
        one, two = (emit("Slice", x, emit.ints(i), end, emit.ints(3), emit.ints(2)) for i in (0, 1))
    else:
        width = _half(node, cos)
        one = emit("Slice", x, emit.ints(0), emit.ints(width), emit.ints(3))
        two = emit("Slice", x, emit.ints(width), emit.ints(2 * width), emit.ints(3))
    left = emit("Sub", emit("Mul", one, cos), emit("Mul", two, sin))
    right = emit("Add", emit("Mul", one, sin), emit("Mul", two, cos))
    if attribute(node, "interleaved", 0):
        pairs = emit("Concat", emit("Unsqueeze", left, emit.ints(4)), emit("Unsqueeze", right, emit.ints(4)), axis=4)
        out = emit("Reshape", pairs, emit.ints(0, 0, 0, -1))
    else:
        out = emit("Concat", left, right, axis=3)
    if rest is not None:
        out = emit("Concat", out, rest, axis=3)
    emit.replace(node, emit("Reshape", out, emit.ints(0, 0, -1)) if flat else out)


def _half(node: ir.Node, cos: ir.Value) -> int:
    """Angles of a head, from the table's shape."""
    value = node.inputs[1]
    while value is not None:
        if value.shape is not None and isinstance(value.shape[-1], int):
            return int(value.shape[-1])
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in ("Cast", "Gather") else None
    raise PreconditionError(f"{node.name} reads {cos.name}, whose width is not known")


class FoldSums(InPlacePass):
    """Sums of two constants, as Gemma has them in each norm (1 + weight), become constants, before they are rounded."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        given = set(graph.inputs)
        changed = False
        for node in [node for node in graph if node.op_type == "Add" and not node.domain]:
            tensors = [v.const_value for v in node.inputs if v is not None and v.is_initializer() and v not in given]
            if len(tensors) != 2 or tensors[0] is None or tensors[1] is None:
                continue
            out = node.outputs[0]
            made = initializer(graph, f"{out.name}.sum", tensors[0].numpy() + tensors[1].numpy())
            ir.convenience.replace_all_uses_with(out, made, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            changed = True
        return PassResult(model, changed)


class DecomposeNorms(InPlacePass):
    """RMSNormalization over the last axis, computed in float32 as its ``stash_type`` says."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "RMSNormalization" and not node.domain]
        for number, node in enumerate(nodes):
            states, weight = node.inputs[:2]
            if states is None or weight is None or attribute(node, "axis", -1) != -1:
                raise PreconditionError(f"{node.name}: only the last axis can be normalised")
            emit = Emit(graph, f"fstq/trt/norm.{number}")
            kind = states.dtype or FLOAT
            x = emit.cast(states, FLOAT)
            mean = emit("ReduceMean", emit("Mul", x, x), emit.ints(-1), keepdims=1)
            root = emit("Sqrt", emit("Add", mean, emit.number(attribute(node, "epsilon", 1e-5), FLOAT)))
            emit.replace(node, emit("Mul", emit.cast(emit("Div", x, root), kind), emit.cast(weight, kind)))
        return PassResult(model, bool(nodes))
