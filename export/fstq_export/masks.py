"""Who may attend to whom in long contexts: the masks that Transformers makes against the rule that the graph follows.

The verification's own runs are short. Here the decoder layers are left out, so a context beyond all windows is cheap.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fstq_export.source import layer_windows
from fstq_infer.errors import VerificationError
from fstq_infer.fisher.hooks import Decoder

_log = logging.getLogger(__name__)
USUAL, LONGEST = 2048, 8192  # tokens; masks are square


class _Seen(Exception):
    """Ends a forward pass that has shown enough."""


def _returns_tuple(decoder: Decoder) -> bool:
    """Whether decoder layers return a tuple; runs only the first."""
    found: list[bool] = []

    def look(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise _Seen

    hook = decoder.layers[0].register_forward_hook(look)
    try:
        with suppress(_Seen):
            decoder.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    finally:
        hook.remove()
    return found[0]


def _restore(layer: torch.nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.__dict__["forward"]
    else:
        layer.__dict__["forward"] = forward


def visible_keys(decoder: Decoder, length: int) -> dict[int, NDArray[np.bool_]]:
    """layer -> (length,) which of ``length`` tokens the last one may attend to by its mask.

    A layer that is given no mask of that length is missing, and so are all where a model's layers cannot be left out.
    """
    seen: dict[int, NDArray[np.bool_]] = {}
    with torch.no_grad(), ExitStack() as stack:
        as_tuple = _returns_tuple(decoder)

        def through(index: int) -> Callable[..., Any]:
            signature = inspect.signature(type(decoder.layers[index]).forward)

            def forward(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(None, *args, **kwargs).arguments
                mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
                if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[-1] == length:
                    row = mask[0, 0, -1]
                    seen[index] = (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2).numpy()
                states = given["hidden_states"]
                return (states,) if as_tuple else states

            return forward

        for index, layer in enumerate(decoder.layers):
            stack.callback(_restore, layer, layer.__dict__.get("forward"))  # accelerate's, where weights are on disk
            layer.__dict__["forward"] = through(index)
        try:
            decoder.model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False, logits_to_keep=1)
        except Exception as error:  # model code that expects more of its layers; the short runs still verify it
            _log.warning("the masks of long contexts could not be compared (%s)", error)
    return seen


def check_masks(decoder: Decoder, name: str) -> None:
    """Compare in a context longer than all windows; raises VerificationError naming the first odd layer."""
    config: Any = decoder.model.config
    config = config.get_text_config(decoder=True)
    if getattr(config, "attention_layers", None) is not None:
        return  # GPT-Neo masks inside its attention
    windows = layer_windows(config)
    longest = max((w + 2 for w in windows if w is not None), default=0)
    length = min(int(config.max_position_embeddings), max(USUAL, longest), LONGEST)
    for layer, seen in visible_keys(decoder, length).items():
        wanted = np.arange(length)[::-1] < (windows[layer] or length)
        if not np.array_equal(seen, wanted):
            raise VerificationError(
                f"{name}: in decoder layer {layer} Transformers lets token {length} attend to {seen.sum()} tokens, the "
                f"exported graph to {wanted.sum()} (sliding window: {windows[layer]}). This model's attention pattern "
                "is not understood; nothing was written"
            )
