"""Linear layers without weights of their own: numbers come from the checkpoint or from codes at each use.

So a model's memory is that of one layer's weights, forward and backward: autograd keeps none of them either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Numbers = Callable[[], torch.Tensor]
PLAIN = (nn.Linear, Conv1D)  # of these, and of no subclass, it is known that they add a bias to a product


class _Product(torch.autograd.Function):
    """``x W^T`` that keeps the way to W, not W; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        ctx.numbers = numbers
        return functional.linear(inputs, numbers())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.numbers(), None


class StreamedLinear(nn.Linear):
    """numbers: gives the weight, (outputs, inputs) float32; whoever changes it changes what is computed."""

    def __init__(self, outputs: int, inputs: int, numbers: Numbers, bias: torch.Tensor | None) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.numbers = numbers
        self.requires_grad_(False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        product: torch.Tensor = _Product.apply(inputs, self.numbers)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


def can_stream(model: nn.Module) -> bool:
    """Whether all linear layers of a model are of a kind that can be taken over."""
    return all(type(module) in PLAIN for module in model.modules() if isinstance(module, PLAIN))


def take_over(model: nn.Module) -> None:
    """Replace the linear layers that accelerate keeps on disk; they are read from where they lie."""
    for name, module in list(model.named_modules()):
        hook: Any = getattr(module, "_hf_hook", None)
        if type(module) not in PLAIN or not getattr(hook, "offload", False):
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _streamed(module, hook.weights_map))
        remove_hook_from_module(module)


def _streamed(module: nn.Module, stored: Any) -> StreamedLinear:
    turned = isinstance(module, Conv1D)
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    outputs, inputs = shape[::-1] if turned else shape

    def numbers() -> torch.Tensor:
        weight: torch.Tensor = stored["weight"].float()
        return weight.T if turned else weight

    bias = None if getattr(module, "bias", None) is None else stored["bias"].float().clone()
    return StreamedLinear(outputs, inputs, numbers, bias)
