"""What a bundle's graph says of its decoder: matrices with their formats, attention heads, bytes. Knows onnx-ir."""

from __future__ import annotations

import re
from typing import Any

from fstq_infer.bundle import Bundle
from fstq_infer.errors import BundleError, MissingExtraError
from fstq_infer.roofline import Decoder, Linear

METADATA = "fstq.format"  # written by the exporter on each operator that reads such a weight
PLAIN = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
PROBE = "fstq.probe."  # its matrices: 0.2 % of a prefill's time, left out
LAYER = re.compile(r"\blayers?[./](\d+)\b|\bh[./](\d+)\b")
READERS = {"MatMul": 1, "Gemm": 1}


def decoder_of(bundle: Bundle) -> Decoder:
    """The decoder of a bundle; reads the graph, no weights.

    Raises MissingExtraError without onnx-ir, BundleError for a graph that cannot be read or has no key-value cache.
    """
    try:
        import onnx_ir as ir
    except ModuleNotFoundError as error:
        raise MissingExtraError("Reading a bundle's graph", error.name or "onnx_ir", "ort") from error
    path = bundle.file("model.onnx")
    try:
        graph = ir.load(path).graph
    except Exception as error:  # whatever a damaged protobuf raises
        raise BundleError(f"{path} cannot be read: {error}. Fetch an undamaged copy.") from error
    model = bundle.manifest.model
    keys = {
        int(match[1]): value.shape
        for value in graph.inputs
        if (match := re.fullmatch(r"past_key_values\.(\d+)\.key", value.name or "")) and value.shape is not None
    }
    if sorted(keys) != list(range(model.layers)):
        raise BundleError(f"{path} has key caches for layers {sorted(keys)}, its manifest names {model.layers} layers.")
    asked = [node.attributes["q_num_heads"].as_int() for node in graph if "q_num_heads" in node.attributes]
    attention = []
    for layer, shape in sorted(keys.items()):
        kv_heads, width = shape[1], shape[3]
        if not isinstance(kv_heads, int) or not isinstance(width, int):
            raise BundleError(f"{path}: the cache of layer {layer} has shape {shape}; heads and width must be fixed.")
        heads = asked[layer] if len(asked) == len(keys) else max(kv_heads, model.hidden_size // width)
        attention.append((heads, kv_heads, width))
    linears = tuple(linear for node in graph if (linear := _linear(node)) is not None)
    if bare := set(keys) - {linear.layer for linear in linears}:
        raise BundleError(
            f"{path}: no matrices of the layers {sorted(bare)} were found by their names; export it again."
        )
    return Decoder(
        linears=linears,
        attention=tuple(attention),
        stored=sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None),
        hidden=model.hidden_size,
        vocabulary=model.vocab_size,
    )


def _linear(node: Any) -> Linear | None:
    """The matrix that a MatMul or Gemm multiplies by, None where it multiplies two activations."""
    place = READERS.get(node.op_type)
    if place is None:
        return None
    value, turned = node.inputs[place], False
    while value is not None and value.const_value is None:
        source = value.producer()
        if source is None or source.op_type not in ("Transpose", "DequantizeLinear", "Cast"):
            return None
        turned ^= source.op_type == "Transpose"
        value = source.inputs[0]
    if value is None or len(value.const_value.shape) != 2:
        return None
    rows, columns = (int(side) for side in value.const_value.shape)
    if "transB" in node.attributes and node.attributes["transB"].as_int():
        turned = not turned
    n, k = (rows, columns) if turned else (columns, rows)
    name = str(value.name)
    if name.startswith(PROBE):
        return None
    stored = node.metadata_props.get(METADATA) or PLAIN.get(value.const_value.dtype.name)
    if stored is None:
        return None
    found = LAYER.search(name) or LAYER.search(str(node.name))
    layer = int(found[1] or found[2]) if found else None
    return Linear(n, k, stored, layer, name)
