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
    """The model without weights (meta device); small buffers are real."""
    with init_empty_weights(include_buffers=False), quiet():
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


def rotary_module(config: Any) -> torch.nn.Module | None:
    """The model's rotary embedding module, if it has one."""
    for name, module in skeleton(config).named_modules():
        if name.endswith("rotary_emb"):
            return module
    return None


def parameter_count(config: Any) -> int:
    """Number of weights, tied ones once."""
    return sum(p.numel() for p in skeleton(config).parameters())


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
    """The float32 model with eager attention and frozen weights.

    stream: keep the decoder layers on disk and load each as it runs, so that memory stays near one layer; default: when
    the weights exceed 256 MiB. A streamed model serves forward passes only.
    """
    if stream is None:
        stream = parameter_count(source.config) * 4 > STREAM_ABOVE
    with tempfile.TemporaryDirectory(prefix="fstq-offload-") as offload, quiet():
        options: dict[str, Any] = {
            "dtype": torch.float32,
            "attn_implementation": "eager",
            "use_safetensors": True,
            "local_files_only": True,
        }
        if stream:
            options |= {"device_map": _device_map(source.config), "offload_folder": offload}
        model = AutoModelForCausalLM.from_pretrained(source.folder, config=source.config, **options)
        yield Decoder.of(model.eval().requires_grad_(False))
