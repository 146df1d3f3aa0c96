"""Numbers as bit planes, and the cursor that reads a message part by part. Nothing here loops over numbers.

A plane block is described in docs/wire-format.md, "A layer".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import MessagePaddingError, MessageTruncatedError

Bytes = NDArray[np.uint8]


def plane_bytes(count: int, width: int) -> int:
    """Bytes of a plane block."""
    return width * ((count + 7) // 8)


def pack_planes(numbers: NDArray[Any], width: int) -> bytes:
    """(n,) unsigned numbers below 2^width -> a plane block."""
    return b"".join(np.packbits((numbers >> bit) & 1).tobytes() for bit in reversed(range(width)))


def unpack_planes(block: Bytes, count: int, width: int, what: str) -> NDArray[Any]:
    """A plane block -> (count,) numbers, of the smallest unsigned type that holds them.

    Raises MessagePaddingError when a padding bit is set.
    """
    numbers = np.zeros(count, np.min_scalar_type((1 << width) - 1))
    row = (count + 7) // 8
    for start in range(0, width * row, row or 1):
        plane = block[start : start + row]
        check_padding(plane, count, what)
        if start:
            np.left_shift(numbers, 1, out=numbers)
        np.bitwise_or(numbers, np.unpackbits(plane, count=count), out=numbers)
    return numbers


def check_padding(block: Bytes, bits: int, what: str) -> None:
    """Raises MessagePaddingError unless the bits after the first ``bits`` of the last byte are 0."""
    if bits % 8 and int(block[-1]) & (0xFF >> bits % 8):
        raise MessagePaddingError(f"a padding bit of the {what} is set, expected zeros. Have the client send it again.")


class Cursor:
    """Reads a message's bytes in order; every part is checked against what is left before it is touched."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self.data) - self.at

    def take(self, size: int, what: str) -> Bytes:
        """The next ``size`` bytes, a view. Raises MessageTruncatedError when fewer are left."""
        if size > self.left:
            raise MessageTruncatedError(
                f"the message ends inside its {what}: {size} bytes expected, {self.left} left. "
                f"Have the client send it again."
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def planes(self, count: int, width: int, what: str) -> NDArray[Any]:
        """The next plane block."""
        return unpack_planes(self.take(plane_bytes(count, width), what), count, width, what)

    def array(self, count: int, dtype: str, what: str) -> NDArray[Any]:
        """The next ``count`` little-endian numbers, an aligned copy in native order."""
        wire = np.dtype(dtype).newbyteorder("<")
        source = self.take(count * wire.itemsize, what)
        numbers = np.empty(count, wire)
        numbers.view(np.uint8)[:] = source
        return numbers.astype(wire.newbyteorder("="), copy=False)
