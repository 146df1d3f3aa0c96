"""The way down, compressed: a server sends what has changed since the weights that a client holds.

The server keeps the weights G that clients hold beside its own W, and sends codes of W - G: what a code leaves out is
in the next difference, so errors do not add up. G is versioned; a client that has missed some versions gets their
messages in a row, one that holds nothing usable gets G whole.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import MessageSizeError, MessageTruncatedError, OptionError, ReplyError
from fstq_infer.federated.compress import Compressor, decompress
from fstq_infer.federated.flower import Array, ArrayRecord, ConfigRecord, RecordDict
from fstq_infer.federated.header import HEADER_BYTES
from fstq_infer.federated.records import pack
from fstq_infer.federated.tensors import TensorManifest

Arrays = dict[str, NDArray[np.float32]]
MOST_MESSAGES, WHOLE = 1024, -1
_KEYS = {"run": str, "version": int, "from": int, "crc": int}


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What goes with weights. version: of the weights that the receiver shall hold, crc: their checksum. since: the
    version that the messages start from, WHOLE where the weights are all there."""

    run: str
    version: int
    since: int
    crc: int

    def into(self, content: Any, arrays: Any) -> Any:
        """A copy of a request's RecordDict with these settings, and ``arrays`` in place of its own."""
        records = dict(content.items())
        key = next(iter(content.config_records), "config")
        mine = {"fstq-run": self.run, "fstq-version": self.version, "fstq-from": self.since, "fstq-crc": self.crc}
        records[key] = ConfigRecord({**dict(records.get(key, {})), **mine})
        records[next(iter(content.array_records))] = arrays
        return RecordDict(records)

    @classmethod
    def of(cls, content: Any) -> Broadcast | None:
        """Those of a request; None where its server sends weights as Flower does. Raises ReplyError for a part only."""
        found: dict[str, Any] = {}
        for record in content.config_records.values():
            found |= {key: record[f"fstq-{key}"] for key in _KEYS if f"fstq-{key}" in record}
        if "version" not in found:
            return None
        for key, kind in _KEYS.items():
            if not isinstance(found.get(key), kind):
                raise ReplyError(f"the server's request holds no {kind.__name__} 'fstq-{key}' beside 'fstq-version'.")
        return cls(found["run"], found["version"], found["from"], found["crc"])


class Downlink:
    """The server's side, for FstqStrategy(downlink=...).

    preset: of compress.PRESETS. budget: bytes of a message, None for as many as it takes. history: versions that a
    client may have missed and still be served by messages. drawn: clients make the first weights themselves
    (DownlinkMod's start), so they are sent only to one that could not.
    """

    def __init__(
        self, preset: str = "fstq", budget: int | None = 65_536, history: int = 8, drawn: bool = False
    ) -> None:
        if not 1 <= history <= MOST_MESSAGES:
            raise OptionError(f"a history of {history} versions, expected 1 to {MOST_MESSAGES}")
        Compressor.preset(preset, TensorManifest((("any", (1,)),)), bytes(16))  # an unknown preset is named now
        self.preset, self.budget = preset, None if preset == "lossless" else budget
        self.version, self.drawn = -1, drawn
        self.weights: Arrays = {}
        self.chain: deque[tuple[int, bytes]] = deque(maxlen=history)  # (version that it leads to, message)
        self.held: dict[int, int] = {}  # node -> version that it has said to hold
        self._target = self._crc = 0

    def advance(self, given: Mapping[str, Any], base: bytes) -> None:
        """Make the next version, towards ``given`` in float32; the same arrays again make none. Raises OptionError for
        integers."""
        for name, array in given.items():
            if array.dtype.kind != "f":
                raise OptionError(f"{name!a} is {array.dtype}, expected floating point. Send such weights whole.")
        arrays = {name: array.astype(np.float32) for name, array in given.items()}
        target = checksum(arrays)
        if self.version >= 0 and target == self._target:
            return
        if self.version < 0:
            self.weights = arrays
        else:
            manifest = TensorManifest.of(self.weights)
            change = {name: array - self.weights[name] for name, array in arrays.items()}
            made = Compressor.preset(self.preset, manifest, base)
            blob, _ = made.compress(change, budget=self.budget, round=self.version + 1)
            self.weights = added(self.weights, decompress(blob, manifest))
            self.chain.append((self.version + 1, blob))
        self.version, self._target = self.version + 1, target
        self._crc = checksum(self.weights)

    def messages_for(self, node: int) -> tuple[int, bytes | None]:
        """(version that a node holds, messages from there on); (WHOLE, None) where it needs all weights."""
        since = self.held.get(node, 0 if self.drawn else WHOLE)
        messages = [blob for version, blob in self.chain if version > since]
        size = sum(len(blob) for blob in messages)
        if since < 0 or since > self.version or since + len(messages) != self.version or size >= self.whole:
            return WHOLE, None
        return since, b"".join(messages)

    @property
    def whole(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self.weights.values())

    def content_for(self, node: int, content: Any, run: str) -> tuple[Any, int]:
        """(request for one node, bytes of its weights): messages since what it holds, or all weights."""
        since, messages = self.messages_for(node)
        broadcast = Broadcast(run, self.version, since, self._crc)
        if messages is None:
            arrays = ArrayRecord({name: Array(values) for name, values in self.weights.items()})
            return broadcast.into(content, arrays), self.whole
        return broadcast.into(content, pack(messages)), len(messages)

    def heard(self, node: int, version: Any) -> None:
        """What a node says that it holds; None: nothing that is known."""
        if isinstance(version, int) and 0 <= version <= self.version:
            self.held[node] = version
        elif self.drawn:
            self.held[node] = WHOLE
        else:
            self.held.pop(node, None)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """(arrays, facts) for a checkpoint."""
        blobs = {f"message {version}": np.frombuffer(blob, np.uint8) for version, blob in self.chain}
        facts = {"version": self.version, "held": self.held, "target": self._target, "names": list(self.weights)}
        return {**{f"weights {name}": array for name, array in self.weights.items()}, **blobs}, facts

    def restore(self, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises KeyError, ValueError or TypeError for a damaged one."""
        self.weights = {name: arrays[f"weights {name}"] for name in facts["names"]}
        self.version, self._target = int(facts["version"]), int(facts["target"])
        self.held = {int(node): int(version) for node, version in facts["held"].items()}
        self.chain.clear()
        versions = sorted(int(key.removeprefix("message ")) for key in arrays if key.startswith("message "))
        self.chain.extend((version, arrays[f"message {version}"].tobytes()) for version in versions)
        self._crc = checksum(self.weights)


def apply(weights: Arrays, held: int, blob: bytes, broadcast: Broadcast, base: bytes) -> Arrays | None:
    """The weights that a client shall hold, from those of version ``held``; None where that is no way to them.

    Raises a MessageError for a message that cannot be read.
    """
    if not broadcast.since <= held <= broadcast.version:
        return None
    manifest = TensorManifest.of(weights)
    for version, message in enumerate(split(blob), broadcast.since + 1):
        if version > held:
            weights = added(weights, decompress(message, manifest, base, version))
    return weights if checksum(weights) == broadcast.crc else None


def added(weights: Arrays, change: Mapping[str, Any]) -> Arrays:
    """weights + change, rounded the same way on server and client."""
    return {name: np.add(values, change[name], dtype=np.float32) for name, values in weights.items()}


def split(blob: bytes) -> Iterator[bytes]:
    """The messages of a row; each says how long it is. Raises MessageSizeError, MessageTruncatedError."""
    at = number = 0
    while at < len(blob):
        number += 1
        if number > MOST_MESSAGES:
            raise MessageSizeError(f"more than {MOST_MESSAGES} messages in a row. Have the server send all weights.")
        size = struct.unpack_from("<I", blob, at + 8)[0] if len(blob) - at >= HEADER_BYTES else 0
        if not HEADER_BYTES <= size <= len(blob) - at:
            raise MessageTruncatedError(f"{len(blob) - at} bytes are left of a row of messages, the next has {size}.")
        yield blob[at : at + size]
        at += size


def checksum(arrays: Mapping[str, Any]) -> int:
    """CRC-32 of names, shapes and values, in their order."""
    crc = 0
    for name, array in arrays.items():
        crc = zlib.crc32(f"{name} {array.shape} {array.dtype.str}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return crc
