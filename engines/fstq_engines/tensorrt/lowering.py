"""From a bundle's graph to the graph that TensorRT is given: which passes run, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_engines.tensorrt.attention import LowerAttention
from fstq_engines.tensorrt.capabilities import Capabilities
from fstq_engines.tensorrt.float4 import OPSET, Float4
from fstq_engines.tensorrt.half import Half
from fstq_engines.tensorrt.positions import CachedPositions
from fstq_engines.tensorrt.selection import KnownColumns, RankSort
from fstq_engines.tensorrt.simple import DecomposeNorms, DecomposeRotary, FoldSums
from fstq_engines.tensorrt.weights import Weights
from fstq_infer.errors import EngineError

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def lower(
    model: ir.Model, capable: Capabilities, borders: Sequence[int], source: str, dtype: str, room: int
) -> ir.Model:
    """The model, changed in place. borders: layers of the pruning stages. source, dtype: names of types, see DTYPES.

    room: columns of cached keys that the engine has, where it updates them in place.

    Raises EngineError for a graph that is not built as expected.
    """
    float4 = Float4()
    passes: list[Any] = [
        FoldSums(),
        KnownColumns(),
        RankSort(),
        Half(DTYPES[source], DTYPES[dtype]),
        Weights(),
        float4,
        CachedPositions(capable, borders),
        LowerAttention(capable, borders, room),
    ]
    passes += [] if capable.rotary else [DecomposeRotary()]
    passes += [] if capable.rms_norm else [DecomposeNorms()]
    passes.append(RemoveUnusedNodesPass())
    for value in replaceable(model):
        model.graph.inputs.remove(value)
    try:
        made: ir.Model = Sequential(*passes)(model).model
    except (ir.passes.PassError, ir.passes.InvariantError) as error:
        cause = error.__cause__
        if isinstance(cause, EngineError):
            raise cause from error
        raise EngineError(
            f"the bundle's graph cannot be lowered for TensorRT: {cause or error}. Export it again, or use "
            "--backend ort."
        ) from error
    for value in [*made.graph.inputs, *made.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape([_length(d) for d in value.shape.dims])
    made.opset_imports[""] = max(capable.opset, OPSET) if float4.changed else capable.opset
    return made


def replaceable(model: ir.Model) -> list[ir.Value]:
    """Inputs with a default: weights of a probe, which adapters may replace. Lowering makes them constants."""
    return [value for value in model.graph.inputs if value.is_initializer()]


def free(model: ir.Model, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Make constants of a lowered graph inputs without a default, as TensorRT has no other; returns the defaults."""
    defaults: dict[str, NDArray[Any]] = {}
    for name in names:
        value = model.graph.initializers.pop(name, None)
        if value is not None and value.const_value is not None:
            defaults[name], value.const_value = value.const_value.numpy(), None
            model.graph.inputs.append(value)
    return defaults


def _length(dim: Any) -> Any:
    """One name for one length, as profiles go by names; ranks of all layers are one: fewer kernels, fewer shapes."""
    name = str(dim)
    return "sequence" if name == "sequence_len" else "rank" if name.startswith("rank.") else dim
