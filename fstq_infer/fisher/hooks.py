"""Looking into, and gating, any Hugging Face causal LM through module hooks. No model code is replaced.

The model has to run with eager attention, so that masks are additive and attention weights are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fstq_infer.errors import UnsupportedModelError
from fstq_infer.fisher.items import Batch

NEVER = -1e9
_LAYER_LISTS = ("layers", "h", "blocks")
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Decoder:
    """Where a causal LM keeps its decoder layers and their attention modules; base is the model without its head."""

    model: nn.Module
    base: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Find the layers; raises UnsupportedModelError with the class name when there is no plain list of them."""
        find = getattr(model, "get_decoder", None)
        base = find() if callable(find) else model
        layers = next((getattr(base, name) for name in _LAYER_LISTS if hasattr(base, name)), None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise UnsupportedModelError(
                f"{type(model).__name__}: found no list of decoder layers under {', '.join(_LAYER_LISTS)}; only "
                "decoder-only causal LMs are supported"
            )
        attentions = [
            next((getattr(layer, name) for name in _ATTENTIONS if hasattr(layer, name)), None) for layer in layers
        ]
        missing = [i for i, attention in enumerate(attentions) if attention is None]
        if missing:
            raise UnsupportedModelError(
                f"{type(model).__name__}: decoder layer {missing[0]} has no attention module; token pruning needs "
                "attention in every layer"
            )
        return cls(model, base, tuple(layers), tuple(a for a in attentions if a is not None))


@dataclass(slots=True)
class Seen:
    """What a forward pass passed by, by layer, and the biases it is to add.

    hidden: layer inputs (B, S, D). attention: weights (B, H, S, S). bias: (B, 1, S, S), added to attention logits.
    calls: the arguments of attention modules, for :func:`heads`.
    """

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    bias: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention computes its weights from, positions applied: query (B, H, S, D), key and value (B, G, S, D).

    H is a multiple of G, the number of key-value heads. scale: of the logits, ``D**-0.5`` in most models.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


def heads(attention: nn.Module, call: Call, **changes: Any) -> Heads | None:
    """The heads of an attention module, by another call as in ``call`` but for ``changes`` to its keyword arguments.

    Only the projections run again. None for the few families that do not use Transformers' attention interface, such as
    GPT-Neo. Not for use within :func:`watch`, which would see the call, nor beside another thread with an eager model.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: list[Heads] = []

    def catch(
        _module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        found.append(Heads(query, key, value, kwargs.get("scaling") or query.shape[-1] ** -0.5))
        return query[..., : value.shape[-1]].transpose(1, 2), None  # of the output's shape; nobody reads it

    ALL_ATTENTION_FUNCTIONS["eager"] = catch
    try:
        attention(*call[0], **{**call[1], **changes})
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
    return found[0] if found else None


def causal_bias(attention_mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """The additive mask (B, 1, S, S) in force, made causal where the model passed none."""
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            return torch.zeros(attention_mask.shape, dtype=hidden.dtype).masked_fill(
                ~attention_mask, torch.finfo(hidden.dtype).min
            )
        return attention_mask
    size = hidden.shape[1]
    return torch.full((size, size), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]


def key_bias(bias: torch.Tensor, total: int) -> torch.Tensor:
    """(B, S') bias on keys -> (B, 1, total, total): for every query but the key's own, zero for later keys."""
    padded = nn.functional.pad(bias, (0, total - bias.shape[1]))
    return padded[:, None, None, :] * (1 - torch.eye(total, dtype=bias.dtype))


def drop_bias(kept: Sequence[NDArray[np.int64]], batch: Batch) -> torch.Tensor:
    """(B, 1, S, S) bias that hides all prompt tokens but the kept ones from other queries.

    kept: per row the indices that stay, counted in the row's own prompt, without its padding.
    A dropped token still sees itself: its output is read by nobody, but has to stay finite.
    """
    total, prompt = batch.ids.shape[1], batch.prompt
    bias = torch.zeros(len(kept), total)
    for row, (indices, length) in enumerate(zip(kept, batch.lengths, strict=True)):
        bias[row, prompt - length : prompt] = NEVER
        bias[row, torch.from_numpy(indices) + prompt - length] = 0
    return bias[:, None, None, :] * (1 - torch.eye(total))


@contextmanager
def watch(
    decoder: Decoder,
    hidden: tuple[int, ...] = (),
    attention: tuple[int, ...] = (),
    calls: tuple[int, ...] = (),
    before: dict[int, Callable[[Seen], None]] | None = None,
) -> Iterator[Seen]:
    """Record layer inputs, attention weights and calls, and add ``seen.bias[l]`` (B, 1, S, S) to layer l's logits.

    ``before[l]`` is called with all that was seen as layer l starts, and may set biases for layer l and later ones:
    this is how a probe that reads layer l's input gates the layers that follow, within one forward pass.
    """
    seen = Seen()

    def on_layer(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index in hidden:
                seen.hidden[index] = args[0] if args else kwargs["hidden_states"]
            if before and index in before:
                before[index](seen)

        return hook

    def on_attention(index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index in calls:
                seen.calls[index] = args, kwargs
            bias = seen.bias.get(index)
            if bias is None:
                return None
            states = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "attention_mask": causal_bias(kwargs.get("attention_mask"), states) + bias}

        return hook

    def on_weights(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} returned no attention weights; load the model with "
                    "attn_implementation='eager'"
                )
            seen.attention[index] = output[1]

        return hook

    with ExitStack() as stack:
        for i, layer in enumerate(decoder.layers):
            if i in hidden or (before and i in before):
                stack.callback(layer.register_forward_pre_hook(on_layer(i), with_kwargs=True).remove)
        for i, module in enumerate(decoder.attentions):
            stack.callback(module.register_forward_pre_hook(on_attention(i), with_kwargs=True).remove)
            if i in attention:
                stack.callback(module.register_forward_hook(on_weights(i), with_kwargs=True).remove)
        yield seen
