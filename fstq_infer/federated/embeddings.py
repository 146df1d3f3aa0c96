"""Gradients of input embeddings, by a hook: the base model is frozen, so autograd would not keep them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Norms = Callable[[], list[NDArray[np.float32]]]


@contextlib.contextmanager
def embedding_gradients(model: Any) -> Iterator[Norms]:
    """Yields what gives, after all backward passes, ||dL/de||^2 of every token: (B, S) for each forward pass."""
    held = list[Any]()

    def keep(module: Any, inputs: Any, output: Any) -> Any:
        held.append(output.detach().requires_grad_())
        return held[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield lambda: [_norms(embedded) for embedded in held]
    finally:
        hook.remove()


def _norms(embedded: Any) -> NDArray[np.float32]:
    if embedded.grad is None:
        return np.zeros(embedded.shape[:2], np.float32)
    norms: NDArray[np.float32] = embedded.grad.float().square().sum(-1).cpu().numpy()
    return norms
