"""A running mean of the server's weights, newer ones counting more: what is delivered. Clients go on from the last.

Few and coarse messages leave noise in the weights of each round; a mean over the last rounds has less of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fstq_infer.federated.flower import Array, ArrayRecord


def share(round: int, exponent: float) -> float:
    """What the weights of a round count in the mean (Shamir and Zhang, arXiv 1212.1824): 1 in round 1.

    exponent: 0 for the plain mean of all rounds; with 4 the last quarter or so of them counts.
    """
    return (1 + exponent) / (round + exponent)


def moved(mean: Mapping[str, Any] | None, arrays: Mapping[str, Any], round: int, exponent: float) -> Any:
    """The mean after a round, an ArrayRecord; the arrays where there is none yet. Integers are taken over."""
    if mean is None:
        return ArrayRecord({name: Array(array.numpy()) for name, array in arrays.items()})
    weight, found = share(round, exponent), dict[str, Any]()
    for name, array in arrays.items():
        new, old = array.numpy(), mean[name].numpy()
        if new.dtype.kind == "f":
            new = (old + weight * (new.astype(np.float64) - old)).astype(new.dtype)
        found[name] = Array(new)
    return ArrayRecord(found)
