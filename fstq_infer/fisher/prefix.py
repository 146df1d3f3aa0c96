"""Layers before a prune layer compute the same whatever is pruned: they run once, later passes start behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Batch

LIMIT = 1 << 30  # bytes of hidden states


class Prefix:
    """Hidden states that enter one decoder layer, of batches seen before, up to ``limit`` bytes of them."""

    def __init__(self, decoder: Decoder, layer: int, limit: int = LIMIT) -> None:
        self.decoder, self.layer, self.room = decoder, layer, limit
        self._known: dict[bytes, torch.Tensor] = {}
        self._shapes: list[int | None] = [None] * layer  # entries of each layer's output tuple; None: a bare tensor

    @contextmanager
    def ahead(self, batch: Batch) -> Iterator[None]:
        """Within, a forward pass over the batch skips the layers before, if it is known, and is remembered otherwise.

        Enter it before other hooks on the layer, which may change what it reads. Needs ``torch.no_grad``.
        """
        key = blake2b(batch.ids.numpy().tobytes() + batch.valid.numpy().tobytes(), digest_size=16).digest()
        states = self._known.get(key)
        with ExitStack() as stack:
            for number, module in enumerate(self.decoder.layers[: self.layer]):
                if states is not None:
                    stack.enter_context(_instead(module, self._answer(states, self._shapes[number])))
                else:
                    stack.callback(module.register_forward_hook(self._shape(number)).remove)
            if states is None:
                hook = self.decoder.layers[self.layer].register_forward_pre_hook(self._keep(key), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _answer(self, states: torch.Tensor, entries: int | None) -> Any:
        return lambda *_args, **_kwargs: states if entries is None else (states, *[None] * (entries - 1))

    def _shape(self, number: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._shapes[number] = len(output) if isinstance(output, tuple) else None

        return hook

    def _keep(self, key: bytes) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            if states.nbytes <= self.room:
                self.room -= states.nbytes
                self._known[key] = states.detach()

        return hook


@contextmanager
def _instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another forward for a while; hooks stay, and a forward that the instance had (offloaded layers) comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
