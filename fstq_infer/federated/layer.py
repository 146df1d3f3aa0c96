"""One layer of a message as arrays, and its bytes written: docs/wire-format.md, "A layer". layer_read.py reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.federated import ans, rice
from fstq_infer.federated.bits import pack_planes
from fstq_infer.federated.codes import BY_ID, Block, Code

FIXED = struct.Struct("<hBBBII")
CODE_BITS, RICE_BITS, COUNT_BITS, FREQUENCY_BITS, BITMAP = 4, 5, 31, 13, 31
MIN_EXPONENT, MAX_EXPONENT = -100, 96  # scales stay normal binary32 numbers, and no value can overflow
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layer:
    """Coordinates of T tensors, each tensor with a code of its own.

    codes: (T,) ids. rice: (T,) Rice parameter, or BITMAP. counts: (T,). exponent: of two, for all scales.
    scales: (T,) float16, 0 where unused. positions: (n,) ascending within each tensor, tensors in manifest order.
    blocks: by code id.
    """

    codes: NDArray[np.uint8]
    rice: NDArray[np.uint8]
    counts: Ints
    exponent: int
    scales: NDArray[np.float16]
    positions: Ints
    blocks: Mapping[int, Block]

    @property
    def mask(self) -> int:
        """Bit c for each code c in use."""
        return sum(1 << id for id in self.blocks)

    def values(self) -> NDArray[np.float32]:
        """(n,) values in the order of ``positions``."""
        found = np.empty(len(self.positions), np.float32)
        scales = np.ldexp(self.scales.astype(np.float32), self.exponent)
        starts, counts = starts_of(self.counts).tolist(), self.counts.tolist()
        for id, block in sorted(self.blocks.items()):
            code, at = BY_ID[id], 0
            values = code.values(block)
            for t in np.flatnonzero(self.codes == id).tolist():
                into, part = found[starts[t] : starts[t] + counts[t]], values[at : at + counts[t]]
                if code.scaled:
                    np.multiply(part, scales[t], out=into)
                else:
                    into[:] = part
                at += counts[t]
        return found


def starts_of(counts: Ints) -> Ints:
    """(T,) index of each tensor's first coordinate."""
    return np.cumsum(counts) - counts


def pieces(array: NDArray[Any], counts: Ints, order: NDArray[Any]) -> NDArray[Any]:
    """Coordinates of the tensors ``order``, in that order; ``array`` holds those of all tensors."""
    if len(order) == len(counts) and np.array_equal(order, np.arange(len(counts))):
        return array
    starts = starts_of(counts)
    edges = zip(starts[order].tolist(), counts[order].tolist(), strict=True)
    return np.concatenate([array[:0], *(array[start : start + count] for start, count in edges)])


def riced(rice_k: NDArray[np.uint8], counts: Ints, sizes: Ints) -> NDArray[np.intp]:
    """Tensors with a Rice-coded support, in the order of the unary stream."""
    chosen = np.flatnonzero((counts > 0) & (counts < sizes) & (rice_k != BITMAP))
    return chosen[np.argsort(rice_k[chosen], kind="stable")]


def supports(positions: Ints, counts: Ints, sizes: Ints) -> NDArray[np.uint8]:
    """(T,) what a writer puts in column ``rice``: the cheapest parameter, or BITMAP where that is smaller still."""
    chosen = np.flatnonzero((counts > 0) & (counts < sizes))
    found = np.zeros(len(counts), np.uint8)
    if not len(chosen):
        return found
    count, size = counts[chosen], sizes[chosen]
    k, cost = rice.parameters(rice.gaps(pieces(positions, counts, chosen), count), count)
    p = count / size
    entropy = size * -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    # A bitmap costs time for every coordinate, sent or not: only where tensors are dense, and where it pays.
    found[chosen] = np.where((p > 0.3) & (entropy * 1.002 + 16 < cost), BITMAP, k)
    return found


def in_use(layer: Layer) -> Iterator[tuple[Code, Block]]:
    """Codes of a layer with their blocks, ascending."""
    return ((BY_ID[id], layer.blocks[id]) for id in sorted(layer.blocks))


def write(layer: Layer, sizes: Ints) -> bytes:
    """Bytes of a layer. sizes: (T,) coordinates that earlier layers left."""
    order = riced(layer.rice, layer.counts, sizes)
    counts = layer.counts[order]
    gap = rice.gaps(pieces(layer.positions, layer.counts, order), counts)
    length, unary, remainders = rice.encode(gap, layer.rice[order], counts)
    coder = ans.Encoder()
    starts = starts_of(layer.counts)
    for t in np.flatnonzero(layer.rice == BITMAP).tolist():
        bitmap = np.zeros(sizes[t], np.uint8)
        bitmap[layer.positions[starts[t] : starts[t] + layer.counts[t]]] = 1
        coder.push(bitmap, ans.share(int(layer.counts[t]), int(sizes[t])))
    for code, block in in_use(layer):
        if code.symbols > 1:
            coder.push(block.symbols, block.frequencies)
    words = coder.words()
    columns: tuple[NDArray[Any], ...] = (layer.codes, layer.rice, layer.counts)
    widths = [int(column.max()).bit_length() for column in columns]
    parts = [
        FIXED.pack(layer.exponent, *widths, length, len(words)),
        *(pack_planes(column, width) for column, width in zip(columns, widths, strict=True)),
        layer.scales[scaled(layer.codes)].astype("<f2").tobytes(),
    ]
    for code, block in in_use(layer):
        if code.learned:
            parts.append(block.table.astype("<f2").tobytes())
        if code.symbols > 1:
            parts.append(pack_planes(block.frequencies, FREQUENCY_BITS))
    parts.append(unary)
    parts += [pack_planes(numbers, k) for k, numbers in remainders]
    for code, block in in_use(layer):
        if code.signed:
            parts.append(np.packbits(block.signs).tobytes())
        if code.raw:
            parts.append(block.raw.astype(f"<{code.raw}").tobytes())
    parts.append(words.astype("<u4").tobytes())
    return b"".join(parts)


def scaled(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(T,) whether a tensor has a scale."""
    return np.isin(codes, [id for id, code in BY_ID.items() if code.scaled])
