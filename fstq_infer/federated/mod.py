"""The client's side: a Flower mod that turns a reply's weights into one compressed message.

>>> app = ClientApp(mods=[FstqMod(base=identity, memory="client-state")])

or, with everything in the app's configuration (run_config or node_config), ``ClientApp(mods=[fstq_mod])``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fstq_infer.errors import DeltaError, FstqError, MessageError, OptionError, PrivacyOrderError, ReplyError
from fstq_infer.federated import message as messages
from fstq_infer.federated import mosaic
from fstq_infer.federated.compress import PRESETS, Compressor
from fstq_infer.federated.feedback import Floats, State
from fstq_infer.federated.flower import ConfigRecord, Error, ErrorCode, Message, RecordDict
from fstq_infer.federated.memory import Memory, MemoryFolder
from fstq_infer.federated.order import CLIPPING_NORM, check_clipping
from fstq_infer.federated.records import FISHER, REPORT, Request, arrays_of, pack
from fstq_infer.federated.tensors import HASH_BYTES, TensorManifest

log = logging.getLogger(__name__)
Arrays = Mapping[str, Any]
MOSAIC = "mosaic"  # a preset without memory, see mosaic.py
NAMES = (*PRESETS, MOSAIC)


@dataclass(frozen=True, slots=True)
class FstqMod:
    """A mod for a ClientApp whose train function returns absolute weights, under the names that it received.

    base: identity of the base model, 16 bytes, the same as the server's. memory: folder for what the client remembers.
    preset: a row of compress.PRESETS, or ``mosaic``. client: name of this client's memory; by default ``client-id`` or
    ``partition-id`` of the node's configuration, or else the node's id. uplink: bytes per second, or a function that
    measures them; reported to the server. fisher_decay: of the average over rounds of what the app returns in the
    array record ``fstq-fisher``, squared gradients by name; in a round without that record all coordinates weigh the
    same.

    A reply that cannot be compressed becomes an error reply, which costs the round this client only.
    """

    base: bytes
    memory: str | Path
    preset: str = "fstq"
    client: str | None = None
    uplink: float | Callable[[], float] | None = None
    fisher_decay: float = 0.9

    def __post_init__(self) -> None:
        if len(self.base) != HASH_BYTES:
            raise OptionError(f"the base model's identity has {len(self.base)} bytes, expected {HASH_BYTES}")
        if self.preset not in NAMES:
            raise OptionError(f"there is no preset {self.preset!a}; choose one of {', '.join(NAMES)}")
        if not 0 <= self.fisher_decay < 1:
            raise OptionError(f"fisher_decay is {self.fisher_decay}, expected 0 to below 1")

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        try:
            request = Request.of(message.content)
            self._check_privacy(message.content)
            sent = _only(message.content.array_records, "the server's request")
            before = arrays_of(sent)
        except FstqError as error:
            return _refused(error, message)
        reply = call_next(message, context)
        if reply.has_error():  # Flower's mods answer the app's reply with some errors: no server waits for that
            return Message(reply.error, reply_to=message)
        try:
            reply.content = self._packed(reply.content, before, request, self._name(context))
        except FstqError as error:
            return _refused(error, message)
        return reply

    def _packed(self, content: Any, before: dict[str, Any], request: Request, client: str) -> Any:
        """The reply's records with a message in place of its weights."""
        weights = {name: record for name, record in content.array_records.items() if name != FISHER}
        after = arrays_of(_only(weights, "the app's reply"))
        manifest = TensorManifest.of(before)
        delta = _difference(after, before)
        if self.preset == MOSAIC:
            tile = mosaic.Tile.within(manifest, request.round, request.slot, request.slots, request.budget or None)
            return self._reply(content, next(iter(weights)), mosaic.compress(delta, manifest, self.base, tile))
        folder = MemoryFolder(Path(self.memory))
        memory = folder.load(client, manifest, self.base, request.run, request.round)
        fisher = self._fisher(memory, content.array_records.get(FISHER), manifest)
        blob, state = Compressor.preset(self.preset, manifest, self.base).compress(
            delta,
            None if fisher is None else manifest.unflatten(fisher),
            _with_unheard(memory, manifest, request),
            request.budget or None,
            request.round,
        )
        folder.save(client, manifest, self.base, request.run, Memory(state, fisher, request.round, blob))
        return self._reply(content, next(iter(weights)), blob)

    def _reply(self, content: Any, name: str, blob: bytes) -> Any:
        records = {name: record for name, record in content.items() if name != FISHER}
        records[name] = pack(blob)
        if (speed := self._speed()) is not None:
            records[REPORT] = ConfigRecord({"uplink": speed})
        return RecordDict(records)

    def _fisher(self, memory: Memory, record: Any, manifest: TensorManifest) -> Floats | None:
        """(N,) running average of the Fisher; None, and nothing kept, where the app sends none."""
        if record is None:
            return None
        new = manifest.flatten(arrays_of(record), "Fisher")
        if memory.fisher is None:
            return new
        decay = np.float32(self.fisher_decay)
        return decay * memory.fisher + (1 - decay) * new

    def _speed(self) -> float | None:
        found = self.uplink() if callable(self.uplink) else self.uplink
        if found is None:
            return None
        if not (math.isfinite(found) and found > 0):
            log.warning("the measured uplink is %s bytes per second, expected a number above 0; not reported", found)
            return None
        return float(found)

    def _name(self, context: Any) -> str:
        node = context.node_config
        return self.client or str(node.get("client-id", node.get("partition-id", context.node_id)))

    def _check_privacy(self, content: Any) -> None:
        if any(CLIPPING_NORM in record for record in content.config_records.values()):
            check_clipping(self.preset)


def fstq_mod(message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
    """An :class:`FstqMod` from the node's configuration, or else the run's: ``fstq-base`` (32 hex digits),
    ``fstq-memory`` (a folder), and, optional, ``fstq-preset`` and ``fstq-uplink`` (bytes per second).
    """
    settings = {**context.run_config, **context.node_config}
    try:
        for key in ("fstq-base", "fstq-memory"):
            if not isinstance(settings.get(key), str):
                raise OptionError(f"'{key}' is missing from the configuration of the node and of the run. Add it.")
        try:
            base = bytes.fromhex(settings["fstq-base"])
        except ValueError as error:
            raise OptionError(f"'fstq-base' is {settings['fstq-base']!a}, expected 32 hexadecimal digits") from error
        uplink = settings.get("fstq-uplink")
        if uplink is not None and not isinstance(uplink, int | float):
            raise OptionError(f"'fstq-uplink' is {uplink!a}, expected a number of bytes per second")
        mod = FstqMod(base, settings["fstq-memory"], str(settings.get("fstq-preset", "fstq")), uplink=uplink)
    except OptionError as error:
        return _refused(error, message)
    return mod(message, context, call_next)


def _with_unheard(memory: Memory, manifest: TensorManifest, request: Request) -> State:
    """The feedback's state; a last message that the server did not use is put back into the residual."""
    state = memory.state
    if request.heard in (-1, memory.round) or not memory.message or state.residual is None:
        return state
    try:
        lost = messages.dense(messages.decode(memory.message, manifest), manifest)
    except MessageError as error:  # written by another version of this package
        log.warning("the message of round %d was not used and cannot be read again: %s", memory.round, error)
        return state
    return State(state.residual + lost, state.velocity)


def _only(records: Mapping[str, Any], what: str) -> Any:
    if len(records) != 1:
        raise ReplyError(
            f"{what} holds {len(records)} array records {sorted(records)[:3]}, expected one with the adapter's weights."
        )
    return next(iter(records.values()))


def _difference(after: Arrays, before: Arrays) -> dict[str, Floats]:
    """after - before in float32; what does not fit the manifest is left for it to name."""
    delta = dict[str, Floats]()
    for name, new in after.items():
        old = before.get(name)
        if old is None:
            raise DeltaError(f"the reply holds {name!a}, which the server did not send. Return the names received.")
        if new.shape != old.shape or new.dtype.kind != "f" or old.dtype.kind != "f":
            raise DeltaError(
                f"{name!a} was sent as {old.dtype} {old.shape} and came back as {new.dtype} {new.shape}, expected "
                f"floating point of one shape. Return the arrays as they came, trained."
            )
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are for the manifest to report
            delta[name] = new.astype(np.float32) - old.astype(np.float32)
    return delta


def _refused(error: FstqError, message: Any) -> Any:
    log.error("no message for round: %s", error)
    code = ErrorCode.MOD_FAILED_PRECONDITION
    kind = "unsound: " if isinstance(error, PrivacyOrderError) else ""
    return Message(Error(code=code, reason=f"fstq_mod: {kind}{error}"), reply_to=message)
