"""From a checkpoint to the bundle's graph: the dense decoder by mobius-onnx, then our passes in order."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from mobius import build as mobius_build

from fstq_export.passes.last_token import LastTokenLogits
from fstq_export.passes.lora import LoraInputs
from fstq_export.passes.positions import KeyPositions
from fstq_export.passes.pruning import PruneStage, TokenPruning
from fstq_export.passes.quantize import Prints, QuantizeWeights
from fstq_export.passes.rotary import RotaryTables
from fstq_export.passes.tied_head import TiedHead
from fstq_export.reference import rotary_module
from fstq_export.source import Source
from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.errors import ExportError, FstqError, UnsupportedModelError
from fstq_infer.quant.codes import Quantized

OPSET, IR_VERSION = 23, 10
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
DTYPES = {"float32": "f32", "float16": "f16"}  # ONNX Runtime cannot check bfloat16 graphs on a CPU
_log = logging.getLogger(__name__)


def build_graph(
    source: Source,
    dtype: str,
    stages: Sequence[PruneStage],
    weights: Mapping[str, Quantized] | None = None,
    prints: Mapping[str, Prints] | None = None,
    adapters: Callable[[ir.Graph], LoraPorts] | None = None,
) -> ir.Model:
    """The whole graph of docs/bundle-format.md. Raises UnsupportedModelError naming architecture and reason.

    weights: codes by name, of weights that are to be stored in a format; prints: see :class:`QuantizeWeights`.
    adapters: tells which inputs for adapters the finished graph gets, its weights still numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = mobius_build(
                str(source.folder), task="text-generation", dtype=DTYPES[dtype], execution_provider="onnx-standard"
            )
        model: ir.Model = package["model"]
    except MemoryError:
        raise
    except Exception as error:  # the exporter raises whatever its model code meets; all of it means: not this model
        reason = str(error) or type(error).__name__
        raise UnsupportedModelError(
            f"{source.architecture} ({source.config.model_type}) cannot be built: {reason}"
        ) from error
    config = source.config
    missing = sorted(name for name, value in model.graph.initializers.items() if value.const_value is None)
    if missing:
        raise UnsupportedModelError(
            f"{source.architecture} ({config.model_type}): the exporter's graph has {len(missing)} weights that the "
            f"checkpoint does not hold, such as {missing[0]}; this variant of the model is not supported"
        )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    layer_types = getattr(config, "layer_types", None)
    rotary = RotaryTables(rotary_module(config), layer_types, int(config.max_position_embeddings))
    passes: list[ir.passes.PassBase] = [
        rotary,
        KeyPositions(source.windows),
        TokenPruning(stages, source.windows),
        LastTokenLogits(),
        TiedHead(tied),
    ]
    _apply(passes, model, source.architecture)
    if adapters is not None:
        ports = adapters(model.graph)
        _apply([LoraInputs(ports.linears, sorted(ports.probes))], model, source.architecture)
    if weights:
        _apply([QuantizeWeights(weights, prints or {})], model, source.architecture)
    if rotary.mended:
        _log.info("rotary embedding mended from the model's own: %s", ", ".join(rotary.mended))
    # Nothing in the graph needs opset 24, and ONNX Runtime for Python 3.10 (JetPack 6) ends at opset 23, IR version 10.
    model.graph.opset_imports[""], model.ir_version = OPSET, IR_VERSION
    return model


def _apply(passes: Sequence[ir.passes.PassBase], model: ir.Model, architecture: str) -> None:
    for step in passes:
        try:
            step(model)
        except FstqError as error:
            raise type(error)(f"{architecture}: {error}") from error
        except Exception as error:
            reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            raise UnsupportedModelError(f"{architecture}: pass {type(step).__name__} failed ({reason})") from error


def save(model: ir.Model, folder: Path) -> None:
    """Write model.onnx and model.onnx.data; the disk's errors come out as ExportError."""
    try:
        ir.save(model, folder / GRAPH, external_data=WEIGHTS)
    except OSError as error:
        raise ExportError(f"the graph could not be written to {folder}: {error}") from error
