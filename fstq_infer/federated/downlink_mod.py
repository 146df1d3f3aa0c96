"""The client's side of a compressed downlink: a mod that gives the app whole weights, whatever came.

>>> app = ClientApp(mods=[DownlinkMod(base, "client-state"), FstqMod(base, "client-state")])
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fstq_infer.errors import FstqError, OptionError, ReplyError, StateError
from fstq_infer.federated import saved
from fstq_infer.federated.downlink import WHOLE, Arrays, Broadcast, apply, checksum
from fstq_infer.federated.flower import Array, ArrayRecord, ConfigRecord, Error, ErrorCode, Message, RecordDict
from fstq_infer.federated.records import PACKED, REPORT, STYPE, arrays_of
from fstq_infer.federated.tensors import HASH_BYTES

log = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True, slots=True)
class DownlinkMod:
    """A mod for training and evaluation, before all others. Arguments are those of FstqMod.

    Weights lie in ``memory`` as float32, two versions for each client. A client that cannot make the weights from what
    it holds answers with an error, and gets them whole next time. start: makes the weights that the federation begins
    with, under the server's names and in their order, for a server whose Downlink is ``drawn``.
    """

    base: bytes
    memory: str | Path
    client: str | None = None
    start: Callable[[], Arrays] | None = None

    def __post_init__(self) -> None:
        if len(self.base) != HASH_BYTES:
            raise OptionError(f"the base model's identity has {len(self.base)} bytes, expected {HASH_BYTES}")

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        node = context.node_config
        client = self.client or str(node.get("client-id", node.get("partition-id", context.node_id)))
        try:
            broadcast = Broadcast.of(message.content)
            if broadcast is None:
                return call_next(message, context)
            name, record = _only(message.content)
            weights = self._weights(record, broadcast, client)
        except FstqError as error:
            log.error("no weights for version: %s", error)
            code = ErrorCode.MOD_FAILED_PRECONDITION
            return Message(Error(code=code, reason=f"downlink: {error}"), reply_to=message)
        whole = ArrayRecord({key: Array(values) for key, values in weights.items()})
        message.content = RecordDict({**dict(message.content.items()), name: whole})
        reply = call_next(message, context)
        if not reply.has_error():
            told = dict(reply.content.config_records.get(REPORT, {}))
            held = ConfigRecord({**told, "held": broadcast.version})
            reply.content = RecordDict({**dict(reply.content.items()), REPORT: held})
        return reply

    def _weights(self, record: Any, broadcast: Broadcast, client: str) -> Arrays:
        """The weights of a request, kept for the next one."""
        if broadcast.since == WHOLE:
            weights = arrays_of(record)
            if checksum(weights) != broadcast.crc:
                raise ReplyError("the weights that came do not match their checksum.")
        else:
            if list(record) != [PACKED] or record[PACKED].stype != STYPE:
                raise ReplyError("the request holds no messages, but says that it does.")
            weights = self._from_messages(bytes(record[PACKED].data), broadcast, client)
        paths = self._paths(client)
        facts = {"version": VERSION, "client": client, "base": self.base.hex(), "run": broadcast.run,
                 "round": broadcast.version, "names": list(weights)}  # fmt: skip
        saved.save(saved.older(*paths, broadcast.version), weights, facts)
        return weights

    def _from_messages(self, blob: bytes, broadcast: Broadcast, client: str) -> Arrays:
        held = sorted(self._held(client, broadcast.run), key=lambda item: item[0], reverse=True)
        if self.start is not None and broadcast.since == 0:
            held.append((0, self.start()))
        for version, weights in held:
            if (found := apply(weights, version, blob, broadcast, self.base)) is not None:
                return found
        versions = [version for version, _ in held] or "none"
        raise ReplyError(
            f"messages from version {broadcast.since} to {broadcast.version} came, but this client holds {versions}. "
            f"The server will send all weights next time."
        )

    def _held(self, client: str, run: str) -> list[tuple[int, Arrays]]:
        found = list[tuple[int, Arrays]]()
        for path in self._paths(client):
            try:
                arrays, facts = saved.load(path)
                expected = {"version": VERSION, "client": client, "base": self.base.hex(), "run": run}
                if all(facts.get(key) == value for key, value in expected.items()):
                    found.append((int(facts["round"]), {name: arrays[name] for name in facts["names"]}))
            except FileNotFoundError:
                continue
            except (StateError, KeyError, TypeError, ValueError) as error:
                log.warning("weights of client %r are lost: %s", client, error)
        return found

    def _paths(self, client: str) -> tuple[Path, Path]:
        name = f"weights-{hashlib.sha256(client.encode()).hexdigest()[:24]}"
        return Path(self.memory) / f"{name}-a.safetensors", Path(self.memory) / f"{name}-b.safetensors"


def _only(content: Any) -> tuple[str, Any]:
    records = list(content.array_records.items())
    if len(records) != 1:
        raise ReplyError(f"the server's request holds {len(records)} array records, expected one.")
    return str(records[0][0]), records[0][1]
