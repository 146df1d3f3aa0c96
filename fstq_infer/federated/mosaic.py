"""Mosaic messages: each client of a round sends a share of the coordinates, all of it, in one bit each.

Which ones follows from round and slot, so no positions are sent, nothing is left over for later rounds, and clients
that come rarely lose nothing. On the server :func:`complete` puts the mean of those who sent a coordinate in place of
what the others did not send, so that whatever the inner strategy averages is an average of what was sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError
from fstq_infer.federated import message as messages
from fstq_infer.federated.allocate import Everything
from fstq_infer.federated.compress import Compressor
from fstq_infer.federated.feedback import Floats, Forget, Ints
from fstq_infer.federated.header import HEADER_BYTES
from fstq_infer.federated.select import Magnitude
from fstq_infer.federated.tensors import TensorManifest

CODE, BITS = "lloyd1", 1
SHARE = 0.4  # where no budget is given
GROUP = 4096  # coordinates that share a scale, at least
FIXED, COLUMN = 24, 40  # bytes of a layer that do not depend on its groups; bits of each group
WORD = 1 << 32


@dataclass(frozen=True, slots=True)
class Tile:
    """The coordinates that one client sends in a round. slot, slots: its place among the clients that were asked.

    share: of all coordinates, in units of 2^-32; a coordinate is in the tiles of ``share * slots`` clients on average.
    """

    round: int
    slot: int
    slots: int
    share: int

    def __post_init__(self) -> None:
        if not 0 <= self.slot < self.slots < WORD or not 0 < self.share <= WORD:
            raise OptionError(
                f"slot {self.slot} of {self.slots} with a share of {self.share}/2^32: expected a slot from 0 to below "
                f"the number of slots, and a share above 0, at most 1"
            )

    @classmethod
    def within(cls, manifest: TensorManifest, round: int, slot: int, slots: int, budget: int | None) -> Tile:
        """The largest tile whose message fits the budget in bytes, None for the usual share."""
        if budget is None:
            return cls(round, slot, slots, int(SHARE * WORD))
        total, groups = manifest.parameters, len(_edges(manifest)) - 1
        bits = 8 * (budget - HEADER_BYTES - FIXED) - COLUMN * groups
        spread = 4 * (max(bits, 0) ** 0.5)  # tiles are drawn: four standard deviations stay free
        return cls(round, slot, slots, min(max(int((bits - spread) / total * WORD), WORD // total + 1), WORD))

    def indices(self, manifest: TensorManifest) -> Ints:
        """(n,) ascending. At least one."""
        place = _hashed(manifest.parameters, self.round)
        start = np.uint32(self.slot * WORD // self.slots)
        with np.errstate(over="ignore"):
            found = np.flatnonzero((place - start) < self.share) if self.share < WORD else np.arange(len(place))
        return found if len(found) else np.array([self.slot % len(place)], np.int64)

    def manifest(self, manifest: TensorManifest, indices: Ints) -> TensorManifest:
        """That of the tile's message: groups of neighbouring tensors; names tell tiles of one size apart."""
        edges = _edges(manifest)
        counts = np.diff(np.searchsorted(indices, edges)).tolist()
        name = f"{manifest.digest.hex()} {self.round} {self.slot}/{self.slots} {self.share}"
        groups = tuple((f"{name} {number}", (count,)) for number, count in enumerate(counts) if count)
        return TensorManifest(groups)


@dataclass(frozen=True, slots=True)
class Part:
    """What one client sent: values at indices, ascending, None for all coordinates. weight: of the client."""

    values: Floats
    indices: Ints | None
    weight: float


def compress(delta: Mapping[str, Any], manifest: TensorManifest, base: bytes, tile: Tile) -> bytes:
    """The message for a tile of a delta. Raises DeltaError for one that does not fit or is not finite."""
    flat = manifest.flatten(delta)
    indices = tile.indices(manifest)
    mine = tile.manifest(manifest, indices)
    coder = Compressor(mine, base, Magnitude(), Everything(CODE), Forget())
    blob, _ = coder.compress(mine.unflatten(flat[indices]), round=tile.round)
    return blob


def is_tile(blob: bytes, manifest: TensorManifest) -> bool:
    """Whether a message is not one of the whole delta: its manifest is another. What it is, decoding finds out."""
    return len(blob) >= HEADER_BYTES and blob[40:HEADER_BYTES] != manifest.digest


def decompress(blob: bytes, manifest: TensorManifest, base: bytes, tile: Tile) -> tuple[Ints, Floats]:
    """(indices, values) of a tile's message. Raises MessageError, see :func:`message.decode`."""
    indices = tile.indices(manifest)
    mine = tile.manifest(manifest, indices)
    return indices, messages.dense(messages.decode(blob, mine, base, tile.round), mine)


def complete(parts: Sequence[Part], total: int, senders: int | None = None) -> list[Floats]:
    """(total,) deltas of all clients: where one did not send, the weighted mean of those who did, or else 0.

    senders: the number of clients that the server's step was chosen for. Fewer leave more noise in the mean, so all
    deltas shrink as if those that are absent had sent zeros; None: they never do.
    """
    step = np.float32(1.0 if senders is None else min(1.0, len(parts) / senders))
    sums, weights = np.zeros(total), np.zeros(total)
    for part in parts:
        where: Any = slice(None) if part.indices is None else part.indices
        sums[where] += part.weight * part.values.astype(np.float64)
        weights[where] += part.weight
    mean = np.divide(sums, weights, out=np.zeros(total), where=weights > 0).astype(np.float32)
    found = list[Floats]()
    for part in parts:
        whole = mean.copy()
        whole[slice(None) if part.indices is None else part.indices] = part.values
        found.append(step * whole)
    return found


def _edges(manifest: TensorManifest) -> Ints:
    """(G + 1,) where groups of whole tensors begin; each has GROUP coordinates or more, but for the last."""
    edges, ends = [0], np.cumsum(manifest.sizes).tolist()
    for end in ends:
        if end - edges[-1] >= GROUP:
            edges.append(end)
    if edges[-1] != ends[-1]:
        edges.append(ends[-1])
    return np.array(edges, np.int64)


def _hashed(total: int, seed: int) -> NDArray[np.uint32]:
    """(total,) a number for each coordinate and round: SplitMix64 (Steele, Lea and Flood, 2014), the upper half."""
    with np.errstate(over="ignore"):
        x = np.arange(total, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(32)).astype(np.uint32)
