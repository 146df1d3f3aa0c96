"""What TensorRT's parser takes and then computes wrongly, or refuses in words that help nobody: found beforehand.

Each was seen on TensorRT-RTX 1.7.1; TensorRT 10.16 and 11 have the same parser. Lowered graphs hold none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from fstq_engines.tensorrt.capabilities import TOPK, Capabilities
from fstq_engines.tensorrt.emit import attribute
from fstq_engines.tensorrt.settings import Range
from fstq_infer.errors import EngineError


def _reads(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _kind(node: ir.Node, index: int = 0) -> ir.DataType | None:
    value = node.inputs[index] if _reads(node, index) else None
    return value.dtype if value is not None else None


@dataclass(frozen=True, slots=True)
class Trap:
    """found: whether a node is one. what: the parser does with it. advice: what to do instead."""

    name: str
    found: Callable[[ir.Node, Capabilities], bool]
    what: str
    advice: str


TRAPS = (
    Trap(
        "is_causal",
        lambda n, _: n.op_type == "Attention" and bool(attribute(n, "is_causal", 0)),
        "is taken as upper-left causal, which is wrong for every call after the first",
        "give the node an explicit mask",
    ),
    Trap(
        "nonpad_kv_seqlen",
        lambda n, _: n.op_type == "Attention" and _reads(n, 6),
        "is dropped with a mere warning, so that free columns would be attended to",
        "give the node an explicit mask",
    ),
    Trap(
        "past_key",
        lambda n, _: n.op_type == "Attention" and (_reads(n, 4) or _reads(n, 5)),
        "is refused",
        "put past and new keys together with Concat, or scatter them with TensorScatter",
    ),
    Trap(
        "softcap",
        lambda n, _: n.op_type == "Attention" and bool(attribute(n, "softcap", 0.0)),
        "is refused",
        "write attention with MatMul, Tanh and Softmax",
    ),
    Trap(
        "Attention node",
        lambda n, c: n.op_type == "Attention" and not c.attention,
        "is not known to this version",
        "write it with MatMul and Softmax",
    ),
    Trap(
        "RotaryEmbedding node",
        lambda n, c: n.op_type == "RotaryEmbedding" and not c.rotary,
        "is not known to this version",
        "write it with Mul, Sub and Add",
    ),
    Trap(
        "RMSNormalization node",
        lambda n, c: n.op_type == "RMSNormalization" and not c.rms_norm,
        "is not known to this version",
        "write it with ReduceMean and Sqrt",
    ),
    Trap(
        "TensorScatter",
        lambda n, c: n.op_type == "TensorScatter" and not c.cache_update,
        "is not known to this version",
        "put past and new keys together with Concat",
    ),
    Trap(
        "NonZero",
        lambda n, _: n.op_type == "NonZero",
        "does not build: its shape depends on computed numbers",
        "use CumSum and ScatterElements",
    ),
    Trap(
        "com.microsoft",
        lambda n, _: n.domain == "com.microsoft",
        "is refused: contributed operators belong to ONNX Runtime",
        "export again: a bundle holds standard operators only",
    ),
    Trap(
        "zero point",
        lambda n, _: (
            n.op_type == "DequantizeLinear" and _reads(n, 2) and _kind(n) in (ir.DataType.INT4, ir.DataType.INT8)
        ),
        "is not taken for weights: int4 and int8 are symmetric",
        "quantize symmetrically, without a zero point",
    ),
    Trap(
        "unsigned codes",
        lambda n, _: n.op_type == "DequantizeLinear" and _kind(n) in (ir.DataType.UINT4, ir.DataType.UINT8),
        "is refused: codes are int4 or int8",
        "quantize symmetrically, with signed codes",
    ),
    Trap(
        "float8",
        lambda n, c: n.op_type == "DequantizeLinear" and "FLOAT8" in str(_kind(n)) and not c.fp8,
        "is not in this GPU's architecture",
        "export with --precision int8 or int4",
    ),
    Trap(
        "float4",
        lambda n, c: n.op_type == "DequantizeLinear" and "FLOAT4" in str(_kind(n)) and not c.nvfp4,
        "is not in this GPU's architecture, or not known to this version (10.8 is the first)",
        "export with --precision int4",
    ),
)


def check_graph(model: ir.Model, capable: Capabilities, profiles: Sequence[dict[str, Range]]) -> None:
    """Raises EngineError that names every trap in the graph, the first node of each, and what to do."""
    found = [_told(trap, nodes) for trap in TRAPS if (nodes := [n for n in model.graph if trap.found(n, capable)])]
    found += _topk(model, profiles)
    if found:
        raise EngineError("the graph cannot be given to TensorRT: " + "; ".join(found))


def _told(trap: Trap, nodes: Sequence[ir.Node]) -> str:
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return f"{trap.name} ({nodes[0].name}{more}) {trap.what}: {trap.advice}"


def _topk(model: ir.Model, profiles: Sequence[dict[str, Range]]) -> list[str]:
    """A TopK whose K is, or may become, more than TensorRT takes; a K that is not fixed counts as the longest row."""
    found = []
    for node in (n for n in model.graph if n.op_type == "TopK"):
        count = node.inputs[1]
        fixed = count.const_value if count is not None else None
        largest = int(fixed.numpy().max()) if fixed is not None else _longest(node.inputs[0], profiles)
        if largest > TOPK:
            how = "" if fixed is not None else ", which depends on the input, and builds with a mere warning"
            found.append(
                f"TopK ({node.name}) may select {largest} of a row{how}: TensorRT takes at most {TOPK}. Build with "
                f"--prompt {TOPK} or less, or select by rank (CumSum and ScatterElements)"
            )
    return found


def _longest(value: ir.Value | None, profiles: Sequence[dict[str, Range]]) -> int:
    dims = list(value.shape.dims) if value is not None and value.shape is not None else []
    named = [profile[str(d)][2] for profile in profiles for d in dims if not isinstance(d, int) and str(d) in profile]
    return max([*named, *(d for d in dims if isinstance(d, int))], default=TOPK + 1)


# What a parser or builder warns about and goes on; each is an error here. Texts of TensorRT-RTX 1.7.1.
_GRAVE = {
    r"not self-consistent|exceeds the maximum value allowed": "a profile exceeds a limit of TensorRT",
    r"Unused Input:|is unused or used only at compile-time": "an input of the graph is dropped",
    r"[Cc]lamp|out of range of|Using the INT32|cast down to INT32": "numbers are changed while parsing",
}


def check_messages(messages: Iterable[str]) -> None:
    """Raises EngineError where a warning says that something else was built than was asked for."""
    for message in messages:
        for pattern, meaning in _GRAVE.items():
            if re.search(pattern, message):
                raise EngineError(f"TensorRT only warns, but this would go wrong: {meaning}. It says: {message:.300}")
