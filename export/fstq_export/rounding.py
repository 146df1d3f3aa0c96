"""How far does rounding alone move a model's outputs? Asked where a graph is further from it than graphs usually are.

Attention that is all but a choice between two tokens turns a difference in the last bit into a visible one, in a few
rows; a large adapter makes such models. The reference is run again, inputs of its layers nudged by about a rounding
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fstq_infer.errors import VerificationError
from fstq_infer.fisher.hooks import Decoder

NUDGE = 1e-6  # relative, deviation; between the written graph and torch a layer's rounding is 3e-7 to 1e-6
SEEDS = (0, 1)
MARGIN = 4.0  # of the larger of the two
MOST = 3e-2  # difference that rounding may excuse; beyond it nothing can be said of a graph
Outputs = dict[str, NDArray[Any]]


@contextmanager
def nudged(decoder: Decoder, seed: int) -> Iterator[None]:
    """Every decoder layer's input times 1 + ``NUDGE`` normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        states = states * (1 + NUDGE * torch.randn(states.shape, generator=generator, dtype=states.dtype))
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def difference(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest absolute difference, over the standard deviation of ``wanted``; inf if not finite."""
    if found.shape != wanted.shape:
        raise VerificationError(f"the graph gives shape {found.shape}, the reference {wanted.shape}")
    gap = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    return float(gap.max() / max(1e-6, float(wanted.std()))) if np.isfinite(gap).all() else float("inf")


class Allowance:
    """How far outputs may be off: ``tolerance``, or what rounding does to them, measured when it is first needed."""

    def __init__(self, decoder: Decoder, tolerance: float, run: Callable[[], Outputs]) -> None:
        """run: the reference's outputs by name, computed anew; called here for those that are wanted."""
        self._decoder, self._run = decoder, run
        self.tolerance, self.wanted = tolerance, run()
        self.noise: dict[str, float] = {}  # differences that rounding makes, once they are measured

    def of(self, name: str, found: float) -> float:
        """For the output of that name, which is off by ``found``."""
        if found <= self.tolerance:
            return self.tolerance
        for seed in () if self.noise else SEEDS:
            with nudged(self._decoder, seed):
                for key, output in self._run().items():
                    self.noise[key] = max(self.noise.get(key, 0.0), difference(output, self.wanted[key]))
        return max(self.tolerance, min(MOST, MARGIN * self.noise[name]))

    def advice(self, name: str) -> str:
        """For an error: where rounding alone moves that output visibly, a graph can be right and fail."""
        if self.noise.get(name, 0.0) <= self.tolerance:
            return ""
        return f"; rounding alone moves the reference by {self.noise[name]:.2g}, weights or an adapter are very large"
