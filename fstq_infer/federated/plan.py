"""What an allocation gets and gives: the words that allocate.py, water.py and compress.py share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.federated.select import Floats, Ints


@dataclass(frozen=True, slots=True)
class Problem:
    """What an allocation may look at: (N,) scores and (N,) update, (N,) Fisher weights or None, (T,) sizes."""

    scores: Floats
    update: Floats
    fisher: Floats | None
    sizes: Ints


@dataclass(frozen=True, slots=True)
class Plan:
    """For L layers and T tensors. counts: (L, T) coordinates. choice: (L, T) keys of ``names``, 0 where none is sent.

    names: number -> quantizer. Layer 0 takes each tensor's best coordinates, layer 1 the next, and so on. chosen: these
    coordinates, (n,) ascending for each layer, where the allocation has sorted them out already.
    """

    counts: Ints
    choice: NDArray[Any]
    names: Mapping[int, str]
    chosen: Sequence[Ints] | None = None


# Plans a message of about so many bits; None: as many as the allocation's own settings ask for.
Planner = Callable[[float | None], Plan]


class Allocation(Protocol):
    """A way to plan messages. What does not depend on the bits is worked out once, by :meth:`planner`."""

    def planner(self, problem: Problem) -> Planner: ...


def support_bits(counts: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.float64]:
    """Entropy of Bernoulli supports with ``counts`` of ``sizes`` coordinates, in bits."""
    p = np.clip(counts / sizes, 0, 1)
    inside = (p > 0) & (p < 1)
    p = np.where(inside, p, 0.5)
    return np.where(inside, -sizes * (p * np.log2(p) + (1 - p) * np.log2(1 - p)), 0.0)
