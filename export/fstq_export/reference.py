"""The Transformers model that an export is calibrated with and checked against, resident or streamed from disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fstq_export.source import Source
from fstq_export.streamed import can_stream, take_over
from fstq_infer.errors import ExportError, UnsupportedModelError
from fstq_infer.fisher.hooks import Decoder

STREAM_ABOVE = 256 << 20  # bytes of weights in float32


@contextmanager
def quiet() -> Iterator[None]:
    """Without Transformers' own progress bars and warnings: ours say what is going on."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def skeleton(config: Any) -> torch.nn.Module:
    """The model without weights (meta device); small buffers are real. Raises UnsupportedModelError."""
    try:
        with init_empty_weights(include_buffers=False), quiet():
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except MemoryError:
        raise
    except Exception as error:  # whatever the model code meets in a configuration it does not expect
        raise UnsupportedModelError(
            f"{config.model_type}: Transformers cannot build this model from its configuration ({error})"
        ) from error
    return model


def rotary_module(config: Any) -> torch.nn.Module | None:
    """The model's rotary embedding module, if it has one."""
    modules = dict(skeleton(config).named_modules())
    return next((module for name, module in modules.items() if name.endswith("rotary_emb")), None)


def parameter_count(config: Any) -> int:
    """Number of weights, tied ones once."""
    model: Any = skeleton(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def _device_map(config: Any) -> dict[str, str]:
    """Decoder layers on disk, everything else in memory."""
    model = skeleton(config)
    layers = Decoder.of(model).layers
    lists = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and module[0] is layers[0]
    )
    placed: dict[str, str] = {lists: "disk"}
    for name, _ in model.named_modules():
        parent = name.rpartition(".")[0]
        is_ancestor = name == "" or lists.startswith(name + ".")
        parent_is_ancestor = parent == "" or lists.startswith(parent + ".")
        if name and not is_ancestor and parent_is_ancestor and name != lists:
            placed[name] = "cpu"
    return placed


@contextmanager
def reference(source: Source, stream: bool | None = None) -> Iterator[Decoder]:
    """The float32 model with eager attention and frozen weights. Raises ExportError where they cannot be read.

    stream: keep the decoder layers in the checkpoint and read each weight as it is used, forward and backward, so that
    memory stays near one layer; default: when the weights exceed 256 MiB. Not of models with linear layers of their own
    making, which stay resident.
    """
    if stream is None:
        stream = parameter_count(source.config) * 4 > STREAM_ABOVE
    stream = stream and can_stream(skeleton(source.config))
    with tempfile.TemporaryDirectory(prefix="fstq-offload-") as offload, quiet():
        options: dict[str, Any] = {
            "dtype": torch.float32,
            "attn_implementation": "eager",
            "use_safetensors": True,
            "local_files_only": True,
        }
        if stream:
            options |= {"device_map": _device_map(source.config), "offload_folder": offload}
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                source.folder, config=source.config, output_loading_info=True, **options
            )
        except MemoryError:
            raise
        except Exception as error:  # safetensors, the file system and Transformers each have errors of their own
            raise ExportError(f"{source.name}: the weights cannot be read ({error})") from error
        if missing := sorted(found["missing_keys"]):
            raise ExportError(
                f"{source.name}: the checkpoint lacks {len(missing)} weights of {source.architecture}, such as "
                f"{missing[0]}; Transformers would fill them with random numbers. Save the whole model first"
            )
        if stream:
            take_over(model)
        yield Decoder.of(model.eval().requires_grad_(False))
