"""A whole message: layers under a header, to bytes and back, and the delta that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import MessageCodecError, MessageTrailingError
from fstq_infer.federated import header as headers
from fstq_infer.federated import layer_read
from fstq_infer.federated.bits import Cursor
from fstq_infer.federated.header import Header
from fstq_infer.federated.layer import Ints, Layer, starts_of, write
from fstq_infer.federated.tensors import TensorManifest


@dataclass(frozen=True, slots=True)
class Message:
    """What a message says: who it is for, and the coordinates it holds."""

    header: Header
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, layers: tuple[Layer, ...], manifest: TensorManifest, base: bytes, round: int) -> Message:
        """A message of these layers."""
        codes = 0
        for layer in layers:
            codes |= layer.mask
        return cls(Header(base, manifest.digest, round, len(layers), codes), layers)


def encode(message: Message, manifest: TensorManifest) -> bytes:
    """The bytes of a message: the same for equal messages."""
    left, body = manifest.sizes, list[bytes]()
    for layer in message.layers:
        body.append(write(layer, left))
        left = left - layer.counts
    return message.header.pack(b"".join(body))


def decode(
    blob: bytes | bytearray | memoryview,
    manifest: TensorManifest,
    base: bytes | None = None,
    round: int | None = None,
) -> Message:
    """Check and read a message. base, round: what the reader expects, None where it does not care.

    Raises a subclass of MessageError, the first that docs/wire-format.md names; whatever the bytes, nothing else.
    """
    header = headers.parse(blob, manifest, base, round)
    cursor = Cursor(np.frombuffer(blob, np.uint8))
    cursor.take(headers.HEADER_BYTES, "header")
    left, layers = manifest.sizes, list[Layer]()
    for _ in range(header.layers):
        layers.append(layer_read.read(cursor, left))
        left = left - layers[-1].counts
    message = Message.of(tuple(layers), manifest, header.base, header.round)
    if message.header.codes != header.codes:
        raise MessageCodecError(
            f"the layers use codes {message.header.codes:#x}, the header announces {header.codes:#x}. {headers.AGAIN}"
        )
    if cursor.left:
        raise MessageTrailingError(f"{cursor.left} bytes follow the last layer. {headers.AGAIN}")
    return Message(header, message.layers)


def dense(message: Message, manifest: TensorManifest) -> NDArray[np.float32]:
    """(N,) the delta that a message stands for, 0 where it holds nothing."""
    flat = np.zeros(manifest.parameters, np.float32)
    left, rest = manifest.sizes, None  # rest: indices of the coordinates that no earlier layer has coded
    for number, layer in enumerate(message.layers):
        if rest is None:
            _scatter(flat, layer, left)
        else:
            flat[rest[_global(layer, left)]] = layer.values()
        if number + 1 < len(message.layers):
            rest = np.delete(np.arange(len(flat)) if rest is None else rest, _global(layer, left))
            left = left - layer.counts
    return flat


def _scatter(flat: NDArray[np.float32], layer: Layer, sizes: Ints) -> None:
    """Put the values of a first layer in their places; tensor by tensor, which keeps to the cache."""
    values = layer.values()
    offsets, starts, counts = starts_of(sizes).tolist(), starts_of(layer.counts).tolist(), layer.counts.tolist()
    for t in np.flatnonzero(layer.counts).tolist():
        into, part = flat[offsets[t] : offsets[t] + int(sizes[t])], slice(starts[t], starts[t] + counts[t])
        if counts[t] == len(into):
            into[:] = values[part]
        else:
            into[layer.positions[part]] = values[part]


def _global(layer: Layer, sizes: Ints) -> Ints:
    """(n,) positions counted from the first tensor's first coordinate."""
    return layer.positions + np.repeat(starts_of(sizes), layer.counts)
