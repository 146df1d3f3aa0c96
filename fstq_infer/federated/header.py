"""The 56 bytes in front of a message: docs/wire-format.md, "Header", and steps 1 to 5 of its checks."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from fstq_infer.errors import (
    MessageChecksumError,
    MessageCodecError,
    MessageFormatError,
    MessageManifestError,
    MessageModelError,
    MessageRoundError,
    MessageSizeError,
    MessageTrailingError,
    MessageTruncatedError,
    MessageVersionError,
    OptionError,
)
from fstq_infer.federated.codes import BY_ID
from fstq_infer.federated.tensors import HASH_BYTES, TensorManifest

MAGIC, VERSION, MAX_LAYERS, MUST_UNDERSTAND = b"FSTM", 1, 4, 0x00FF
_LAYOUT = struct.Struct(f"<4sBBHIIII{HASH_BYTES}s{HASH_BYTES}s")
HEADER_BYTES, _CRC_AT = _LAYOUT.size, 12
AGAIN = "Have the client send it again."


@dataclass(frozen=True, slots=True)
class Header:
    """What a message says of itself. base and manifest: 16 bytes each; codes: bit c for code c.

    Raises OptionError for a round, an identity or a number of layers that does not fit its field.
    """

    base: bytes
    manifest: bytes
    round: int
    layers: int
    codes: int
    features: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.round < 1 << 32:
            raise OptionError(f"a round is a number from 0 to 4294967295, found {self.round}")
        if self.layers > MAX_LAYERS:
            raise OptionError(f"a message has at most {MAX_LAYERS} layers, found {self.layers}. Use fewer shares.")
        if len(self.base) != HASH_BYTES:
            raise OptionError(
                f"the base model's identity has {len(self.base)} bytes, expected the first {HASH_BYTES} of a SHA-256"
            )

    def pack(self, body: bytes) -> bytes:
        """The whole message: header and ``body``. Raises OptionError above 4 GiB."""
        length = HEADER_BYTES + len(body)
        if length >= 1 << 32:
            raise OptionError(f"the message would have {length} bytes, expected fewer than 4 GiB. Use smaller codes.")
        fields = (self.round, self.codes, self.base, self.manifest)
        front = _LAYOUT.pack(MAGIC, VERSION, self.layers, self.features, length, 0, *fields)
        crc = _crc(front, body)
        return front[:_CRC_AT] + struct.pack("<I", crc) + front[_CRC_AT + 4 :] + body


def _crc(front: bytes | memoryview, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(front[_CRC_AT + 4 :], zlib.crc32(front[:_CRC_AT])))


def largest(manifest: TensorManifest) -> int:
    """Bytes above which no message for this manifest is read."""
    return 8 * manifest.parameters + 64 * len(manifest.tensors) + 65_536


def parse(
    blob: bytes | bytearray | memoryview, manifest: TensorManifest, base: bytes | None, round: int | None
) -> Header:
    """Check a message as far as its header goes. base, round: what the reader expects, None where it does not care.

    Raises the subclasses of MessageError that steps 1 to 5 name, in that order.
    """
    view = memoryview(blob).cast("B")
    if len(view) < HEADER_BYTES:
        raise MessageTruncatedError(f"{len(view)} bytes, expected a header of {HEADER_BYTES}. {AGAIN}")
    magic, version, layers, features, length, crc, number, codes, model, digest = _LAYOUT.unpack_from(view)
    if magic != MAGIC:
        raise MessageFormatError(f"the bytes start with {magic!a}, expected {MAGIC!a}. Is this a message?")
    if version != VERSION:
        age, who = ("a newer", "server") if version > VERSION else ("an older", "client")
        raise MessageVersionError(
            f"the message has version {version}, {age} one than version {VERSION}, which this fstq-infer reads. "
            f"Update fstq-infer on the {who}."
        )
    if features & MUST_UNDERSTAND:
        raise MessageVersionError(
            f"the message needs features {features & MUST_UNDERSTAND:#04x}, which this fstq-infer lacks. Update it."
        )
    if not HEADER_BYTES <= length <= largest(manifest):
        raise MessageSizeError(
            f"the message declares {length} bytes, expected {HEADER_BYTES} to {largest(manifest)} for this manifest. "
            f"{AGAIN}"
        )
    if len(view) < length:
        raise MessageTruncatedError(f"{len(view)} bytes of {length} have arrived. {AGAIN}")
    if len(view) > length:
        raise MessageTrailingError(f"{len(view) - length} bytes follow a message of {length}. {AGAIN}")
    if (found := _crc(view[:HEADER_BYTES], view[HEADER_BYTES:])) != crc:
        raise MessageChecksumError(f"the content has CRC {found:#010x}, its header says {crc:#010x}. {AGAIN}")
    if base is not None and model != base:
        raise MessageModelError(
            f"the message is for base model {model.hex()}, expected {base.hex()}. Give client and server the same."
        )
    if digest != manifest.digest:
        raise MessageManifestError(
            f"the message is for tensors {digest.hex()}, expected {manifest.digest.hex()}: names, shapes and order "
            f"of the adapter's tensors differ. Give client and server the same LoRA settings."
        )
    if round is not None and number != round:
        raise MessageRoundError(f"the message is of round {number}, expected {round}. Leave it out of this round.")
    if layers > MAX_LAYERS:
        raise MessageSizeError(f"the message has {layers} layers, expected at most {MAX_LAYERS}. {AGAIN}")
    if unknown := codes & ~sum(1 << id for id in BY_ID):
        id = (unknown & -unknown).bit_length() - 1
        raise MessageCodecError(
            f"the message uses code {id}, known are {min(BY_ID)} to {max(BY_ID)}. Update this side."
        )
    return Header(bytes(model), bytes(digest), number, layers, codes, features)
