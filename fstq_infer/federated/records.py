"""What client and server put into Flower's records: a message as one array, and settings beside those of the strategy.

A message travels as an Array whose serialization type is ``fstq``: no npy header, and code that takes it for weights is
refused by Flower itself. Settings live in the one ConfigRecord that strategies send: Flower's privacy mods accept no
second one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fstq_infer.errors import ReplyError
from fstq_infer.federated.flower import Array, ArrayRecord, ConfigRecord, RecordDict

PACKED, STYPE = "fstq", "fstq"  # name of the only array, and its serialization type
FISHER = "fstq-fisher"  # record of a reply: the app's squared gradients, for the mod
REPORT = "fstq"  # record of a reply: what the mod tells the server
_KEYS = {"run": str, "round": int, "heard": int, "budget": int, "slot": int, "slots": int}


@dataclass(frozen=True, slots=True)
class Request:
    """What a server tells one client with the weights.

    run: names one federation, across restarts of its server. heard: round of this client's last message that was used;
    0 if none of those it was asked for; -1 if this node is new to the server (SuperNodes may get a new id when they
    restart). budget: bytes of the message, 0 for as many as it takes. slot, slots: the client's place among those asked
    in this round, and their number: what a mosaic message holds follows from them.
    """

    run: str
    round: int
    heard: int
    budget: int
    slot: int = 0
    slots: int = 1

    def into(self, content: Any) -> Any:
        """A copy of a RecordDict with these settings in its ConfigRecord; records and arrays are shared."""
        mine = {f"fstq-{name}": getattr(self, name) for name in _KEYS}
        records = dict(content.items())
        key = next(iter(content.config_records), "config")
        records[key] = ConfigRecord({**dict(records.get(key, {})), **mine})
        return RecordDict(records)

    @classmethod
    def of(cls, content: Any) -> Request:
        """Those of a RecordDict. Raises ReplyError where a server sent none."""
        found: dict[str, Any] = {}
        for record in content.config_records.values():
            found |= {name: record[f"fstq-{name}"] for name in _KEYS if f"fstq-{name}" in record}
        for name, kind in _KEYS.items():
            if not isinstance(found.get(name), kind):
                raise ReplyError(
                    f"the server's request holds no {kind.__name__} 'fstq-{name}', so it would not read a compressed "
                    f"reply. Wrap its strategy in FstqStrategy, or remove fstq_mod from this client."
                )
        return cls(**found)


def pack(blob: bytes) -> Any:
    """An ArrayRecord that holds a message."""
    return ArrayRecord({PACKED: Array(dtype="uint8", shape=(len(blob),), stype=STYPE, data=blob)})


def unpack(content: Any) -> bytes:
    """The message in a reply's RecordDict. Raises ReplyError where there is none."""
    records = list(content.array_records.values())
    if len(records) != 1 or list(records[0]) != [PACKED] or records[0][PACKED].stype != STYPE:
        held = [sorted(record)[:3] for record in records[:3]]
        raise ReplyError(
            f"the reply holds {len(records)} array records {held}, expected one with the array '{PACKED}'. "
            f"Put fstq_mod first in the client's mods."
        )
    return bytes(records[0][PACKED].data)


def arrays_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """numpy arrays of an ArrayRecord by name. Raises ReplyError for one that holds something else."""
    try:
        return {name: array.numpy() for name, array in record.items()}
    except (TypeError, ValueError) as error:
        raise ReplyError(f"the arrays cannot be read: {error}. Send numpy arrays or torch tensors.") from error
