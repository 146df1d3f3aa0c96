"""Reading a decoder graph: which node belongs to which layer, and what crosses from one layer to the next."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fstq_infer.errors import UnsupportedModelError

_LAYER = re.compile(r"(?:^|/)(?:layers|h|blocks)\.(\d+)(?:/|$)")
_STARTS = ("RMSNormalization", "LayerNormalization", "MatMul")
OURS = "fstq/"  # name scope of the nodes that our passes insert
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def layer_of(node: ir.Node) -> int | None:
    """The decoder layer a node belongs to, from its name scope; None for embedding, rotary tables, masks and head."""
    match = _LAYER.search(node.name or "")
    return int(match.group(1)) if match else None


@dataclass(frozen=True, slots=True)
class Crossing:
    """What the layers from ``layer`` on read from outside: one residual, and side values shared by many layers."""

    layer: int
    residual: ir.Value
    side: tuple[ir.Value, ...]


def attention_nodes(graph: ir.Graph) -> dict[int, ir.Node]:
    """layer -> its one Attention node; raises UnsupportedModelError where a layer has none or several."""
    found: dict[int, ir.Node] = {}
    layers = {layer for node in graph if (layer := layer_of(node)) is not None}
    for node in graph:
        layer = layer_of(node)
        if node.op_type == "Attention" and layer is not None:
            if layer in found:
                raise UnsupportedModelError(
                    f"decoder layer {layer} has several Attention nodes; token pruning expects one per layer"
                )
            found[layer] = node
    missing = sorted(layers - found.keys())
    if missing or not layers:
        raise UnsupportedModelError(
            f"decoder layer {missing[0] if missing else 0} of {len(layers)} has no Attention node (a recurrent or "
            "convolutional layer?); only decoders with attention in every layer are supported"
        )
    return found


def crossing(graph: ir.Graph, layer: int) -> Crossing:
    """The boundary before ``layer``; ``layer = number of layers`` is the boundary before final norm and head.

    Raises UnsupportedModelError when more than one residual tensor crosses (parallel streams, shared caches).
    """
    early: dict[ir.Value, None] = {}
    side: dict[ir.Value, None] = {}
    layers = len(attention_nodes(graph))
    for node in graph:
        at = layer_of(node)
        is_tail = at is None and layer == layers and not (node.name or "").startswith(OURS)
        is_late = (at is not None and at >= layer) or is_tail
        if not is_late:
            continue
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if value is None or producer is None:
                continue
            source = layer_of(producer)
            if source is not None and source < layer:
                early[value] = None
            elif source is None and at is not None:
                side[value] = None
    if layer == 0:
        # Layer 0 reads its residual with a norm, or with a projection where norms come after the blocks (OLMo 2).
        starts = (n for n in graph if layer_of(n) == 0 and n.op_type in _STARTS and n.inputs[0] in side)
        residual = next((n.inputs[0] for n in starts), None)
        if residual is None:
            raise UnsupportedModelError(
                "decoder layer 0 begins with neither a norm nor a projection of the embeddings; "
                "this block layout is not supported"
            )
        return Crossing(0, residual, tuple(v for v in side if v is not residual))
    if len(early) != 1:
        names = ", ".join(sorted(str(v.name) for v in early)[:4]) or "none"
        raise UnsupportedModelError(
            f"expected one tensor to cross from decoder layer {layer - 1} to {layer}, found {len(early)}: {names}"
        )
    return Crossing(layer, next(iter(early)), tuple(side))


def int64(name: str, dims: Sequence[int | str]) -> ir.Value:
    """A new int64 value for the graph's inputs."""
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(dims))


class Emit:
    """Emits named nodes and constants in order; ``nodes`` are then inserted where they belong."""

    def __init__(self, graph: ir.Graph, scope: str) -> None:
        self.graph, self.scope = graph, scope
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: int | float | str | list[int]) -> ir.Value:
        """One node with one output."""
        return self.multi(op_type, 1, *inputs, **attributes)[0]

    def multi(
        self, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: int | float | str | list[int]
    ) -> tuple[ir.Value, ...]:
        """One node with several outputs."""
        name = f"{self.scope}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, list(inputs), attributes=attributes or None, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}"
        self.nodes.append(node)
        return tuple(node.outputs)

    def const(self, array: NDArray[Any]) -> ir.Value:
        """A constant; equal ones are shared within the graph."""
        data = array.tobytes()
        content = data.hex() if len(data) <= 64 else hashlib.sha256(data).hexdigest()
        return self.weight(f"fstq/const/{array.dtype}{list(array.shape)}/{content}", array)

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.const(np.array(values, np.int64))

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer of that name."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            self.graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return self.graph.initializers[name]
