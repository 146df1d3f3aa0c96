"""Positions as Rice-coded gaps: docs/wire-format.md, "Rice". All tensors of a layer at once, without a loop over gaps.

Rice (1979); for a Bernoulli support gaps are geometric, and the best parameter costs 0.3 to 2 % more than entropy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import MessageSupportError

MAX_K = 24
Ints = NDArray[np.int64]
Gaps = NDArray[np.int32]  # sizes are below 2^31, and half the memory is half the time


def gaps(positions: Ints, counts: Ints) -> Gaps:
    """Distances from each position to the one before in its tensor, minus 1; the first's is the position itself.

    positions: ascending within each tensor, (sum of counts,). counts: all > 0.
    """
    found = np.empty(len(positions), np.int32)
    np.subtract(positions[1:], positions[:-1], out=found[1:], casting="same_kind")
    found -= 1
    starts = _starts(counts)
    found[starts] = positions[starts]
    return found


def parameters(gap: Gaps, counts: Ints) -> tuple[NDArray[np.uint8], Ints]:
    """(T,) best Rice parameter of each tensor, and the bits of its gaps with it. counts: all > 0."""
    starts = _starts(counts)
    total = np.add.reduceat(gap, starts)  # below the tensor's size, so 32 bits hold it
    # k near log2(mean x ln 2) is best for a geometric law; real supports cluster, which makes a lower one better.
    guess = np.floor(np.log2(np.maximum(total / counts * np.log(2), 1))).astype(np.int64)
    best_k, best = np.zeros_like(counts), np.full_like(counts, np.iinfo(np.int64).max)
    for offset in (-1, 0, 1):
        k = np.clip(guess + offset, 0, MAX_K)
        quotients = gap >> np.repeat(k.astype(np.int32), counts)
        cost = np.add.reduceat(quotients, starts) + counts * (k + 1)
        better = cost < best
        best_k, best = np.where(better, k, best_k), np.where(better, cost, best)
    return best_k.astype(np.uint8), best


def encode(gap: Gaps, k: NDArray[np.uint8], counts: Ints) -> tuple[int, bytes, list[tuple[int, NDArray[Any]]]]:
    """(bits of the unary stream, the stream, [(k, remainders)]) with tensors in the given order, k ascending.

    gap: (sum of counts,) in that order.
    """
    ends = np.empty(len(gap), np.int64)
    remainders: list[tuple[int, NDArray[Any]]] = []
    for width, part in _runs(k, counts):
        np.right_shift(gap[part], width, out=ends[part])
        if width:
            remainders.append((width, (gap[part] & ((1 << width) - 1)).astype(np.uint32)))
    ends += 1
    np.cumsum(ends, out=ends)
    length = int(ends[-1]) if len(ends) else 0
    stream = np.zeros(length, np.uint8)
    stream[ends - 1] = 1
    return length, np.packbits(stream).tobytes(), remainders


def ends(stream: NDArray[np.uint8], length: int, count: int) -> Ints:
    """(count,) positions of the 1 bits of a unary stream of ``length`` bits. Raises MessageSupportError."""
    found: Ints = np.flatnonzero(np.unpackbits(stream, count=length).view(bool))
    if len(found) != count or (count and found[-1] != length - 1) or (length and not count):
        raise MessageSupportError(
            f"the unary stream holds {len(found)} quotients in {length} bits, expected {count}, the last bit a 1. "
            f"Have the client send it again."
        )
    return found


def positions(ends: Ints, remainders: dict[int, NDArray[Any]], k: NDArray[np.uint8], counts: Ints, sizes: Ints) -> Ints:
    """Positions of all tensors, in their order. ends: of the unary stream. remainders: by k. counts: all > 0.

    Raises MessageSupportError when one is not below its tensor's size.
    """
    if not len(ends):
        return ends
    index = np.arange(len(ends))
    found = ends - index  # the sum of all quotients so far
    before = 0  # gaps cannot overflow: quotients sum to less than 2^33, and k is at most 24
    for width, part in _runs(k, counts):
        last = int(found[part.stop - 1])
        found[part] -= before
        found[part] <<= width
        if width:
            found[part] += np.cumsum(remainders[width], dtype=np.int64)
        before = last
        # Within a run values are running sums of gaps; subtracting the sum before each tensor is left to the end.
    found += index
    starts = _starts(counts)
    base = np.where(starts > 0, found[starts - 1] + 1, 0)
    base[_run_starts(k)] = starts[_run_starts(k)]  # a run's sums start anew, ``index`` does not
    found -= np.repeat(base, counts)
    lasts = found[starts + counts - 1]
    if np.any(lasts >= sizes):
        worst = int(np.argmax(lasts - sizes))
        raise MessageSupportError(
            f"a position is {lasts[worst]}, expected below its tensor's size {sizes[worst]}. Have it sent again."
        )
    return found


def _starts(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


def _run_starts(k: NDArray[np.uint8]) -> Ints:
    """(R,) indices of the tensors at which a new k begins."""
    return np.flatnonzero(np.concatenate(([True], k[1:] != k[:-1])))


def _runs(k: NDArray[np.uint8], counts: Ints) -> list[tuple[int, slice]]:
    """(k, slice of coordinates) of each run of tensors with the same k."""
    if not len(k):
        return []
    firsts, starts = _run_starts(k), _starts(counts)
    edges = [*starts[firsts].tolist(), int(counts.sum())]
    return [(int(k[first]), slice(edges[i], edges[i + 1])) for i, first in enumerate(firsts)]
