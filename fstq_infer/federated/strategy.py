"""The server's side: a wrapper that lets any Flower strategy aggregate compressed replies.

>>> strategy = FstqStrategy(FedAvg(fraction_train=0.3), base=identity, budgets=UplinkBudgets(seconds=2))
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from fstq_infer.errors import FstqError, MessageValueError, OptionError, PrivacyOrderError, ReplyError
from fstq_infer.federated import message, mosaic
from fstq_infer.federated.budget import UplinkBudgets
from fstq_infer.federated.downlink import Downlink
from fstq_infer.federated.flower import Array, ArrayRecord, MetricRecord, RecordDict, Strategy
from fstq_infer.federated.order import mosaic_reason
from fstq_infer.federated.records import REPORT, Request, arrays_of, unpack
from fstq_infer.federated.replies import Signature, metrics_of, most_common, signature
from fstq_infer.federated.tensors import HASH_BYTES, TensorManifest

log = logging.getLogger(__name__)


class Budgets(Protocol):
    """Bytes of one client's message, 0 for no limit; reported: its bytes per second, where it has told them."""

    def bytes_for(self, node: int, reported: float | None = None) -> int: ...


class FstqStrategy(Strategy):  # type: ignore[misc]  # Flower is not type-checked here
    """Decodes replies of clients that run fstq_mod to absolute weights; all else is the inner strategy's.

    inner: any Flower strategy, privacy wrappers that clip on the server included. base: identity of the base model, 16
    bytes, as the clients have it. run: names the federation; with the same name clients go on after a server restarts.
    max_norm: an update with a larger Euclidean norm is refused; None for no limit. uniform: weigh all clients alike,
    whatever they report. least: a round with fewer good replies changes nothing. Noise of a privacy wrapper is made for
    the mean of so many equal parts, so it needs both. downlink: send changes to clients that run DownlinkMod, in place
    of all weights; updates are then against what clients hold, and are added to the server's own weights. senders: of
    mosaic messages, for which the inner strategy's learning rate was chosen: with fewer a round's step is smaller.

    A reply that is stale, damaged, hostile or for another model is left out and counted, by kind of error, in the
    round's metrics: ``fstq-used``, ``fstq-refused``, ``fstq-refused-KIND``, ``fstq-bytes`` (of all messages that came).
    """

    def __init__(
        self,
        inner: Any,
        base: bytes,
        budgets: Budgets | None = None,
        run: str | None = None,
        max_norm: float | None = None,
        uniform: bool = False,
        least: int = 0,
        downlink: Downlink | None = None,
        senders: int | None = None,
    ) -> None:
        if len(base) != HASH_BYTES:
            raise OptionError(f"the base model's identity has {len(base)} bytes, expected {HASH_BYTES}")
        if senders is not None and senders < 1:
            raise OptionError(f"senders is {senders}, expected 1 or more, or None for steps that do not shrink")
        self.inner, self.base, self.senders = inner, base, senders
        self.budgets: Budgets = budgets or UplinkBudgets()
        self.run = run or secrets.token_hex(8)
        self.max_norm, self.uniform, self.least, self.downlink = max_norm, uniform, least, downlink
        self.heard: dict[int, int] = {}  # node -> round of its last message that was used, 0 for none
        self.uplinks: dict[int, float] = {}  # node -> bytes per second it has told
        self.refused: Counter[str] = Counter()  # kind of error -> replies, over all rounds
        self.sent = 0  # bytes of weights in the requests of the last round
        self._arrays: dict[str, Any] = {}
        self._manifest: TensorManifest | None = None
        self._asked: set[int] = set()
        self._tiles: dict[int, mosaic.Tile] = {}  # node -> what a mosaic message of this round holds
        self._parts: dict[int, mosaic.Part] = {}  # node -> what it sent

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """The inner strategy's requests, each with what one client needs to compress its reply."""
        self._arrays = arrays_of(arrays)
        self._manifest = TensorManifest.of(self._arrays)
        requests = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._asked = {request.metadata.dst_node_id for request in requests}
        self.sent, self._tiles = self._broadcast(requests, self._arrays), {}
        for slot, request in enumerate(requests):
            node = request.metadata.dst_node_id
            budget = self.budgets.bytes_for(node, self.uplinks.get(node))
            mine = Request(self.run, server_round, self.heard.get(node, -1), budget, slot, len(requests))
            self._tiles[node] = mosaic.Tile.within(self._manifest, server_round, slot, len(requests), budget or None)
            self.heard.setdefault(node, 0)
            request.content = mine.into(request.content)
        return requests

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """What the inner strategy makes of all replies that can be read; its metrics, and ours."""
        failed, read, refused, size = list[Any](), list[tuple[Any, Signature]](), Counter[str](), 0
        waiting, self._parts = set(self._asked), {}
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):  # sums do not depend on arrival
            node = reply.metadata.src_node_id
            report = None if reply.has_error() else reply.content.config_records.get(REPORT, {}).get("uplink")
            self._told(reply)
            if reply.has_error():
                failed.append(reply)
                refused["ClientError"] += 1
                continue
            try:
                if node not in waiting:
                    raise ReplyError(f"node {node} was not asked, or has answered already.")
                waiting.discard(node)
                blob = unpack(reply.content)
                size += len(blob)
                read.append(self._read(reply, blob, server_round))
                if isinstance(report, float) and 0 < report < float("inf"):
                    self.uplinks[node] = report
            except FstqError as error:
                refused[type(error).__name__] += 1
                log.warning("round %d: reply of node %d is left out: %s", server_round, node, error)
        usual = most_common([held for _, held in read])
        used = [reply for reply, held in read if held == usual]
        if len(used) < len(read):
            refused["ReplyError"] += len(read) - len(used)
            log.warning("round %d: %d replies have other metrics than most", server_round, len(read) - len(used))
        used = self._complete(used, refused, server_round)
        if len(used) < self.least:
            refused["TooFewError"] += len(used)
            log.warning("round %d: %d good replies, expected %d: not used", server_round, len(used), self.least)
            used = []
        self.heard |= {reply.metadata.src_node_id: server_round for reply in used}
        self.refused += refused
        arrays, metrics = self.inner.aggregate_train(server_round, [*used, *failed])
        counts = {"fstq-used": len(used), "fstq-refused": refused.total(), "fstq-bytes": size}
        kinds = {f"fstq-refused-{kind}": count for kind, count in sorted(refused.items())}
        return arrays, MetricRecord({**dict(metrics or {}), **counts, **kinds})

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """The inner strategy's requests; with a downlink they hold what clients lack."""
        requests = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        if requests:
            self.sent += self._broadcast(requests, arrays_of(arrays))
        return requests

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> Any:
        """The inner strategy's."""
        replies = list(replies)
        for reply in replies:
            self._told(reply)
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the settings, and those of the inner strategy."""
        log.info("fstq: messages for base model %s, run %s, %s", self.base.hex(), self.run, self.budgets)
        self.inner.summary()

    def _broadcast(self, requests: list[Any], arrays: dict[str, Any]) -> int:
        """Put changes in place of weights where there is a downlink; the bytes of all weights and changes."""
        if self.downlink is None:
            return len(requests) * sum(int(array.nbytes) for array in arrays.values())
        self.downlink.advance(arrays, self.base)
        size = 0
        for request in requests:
            node = request.metadata.dst_node_id
            request.content, part = self.downlink.content_for(node, request.content, self.run)
            size += part
        return size

    def _told(self, reply: Any) -> None:
        """Note the weights that a client says to hold; one that met an error gets all of them next time."""
        if self.downlink is None:
            return
        told = {} if reply.has_error() else reply.content.config_records.get(REPORT, {})
        self.downlink.heard(reply.metadata.src_node_id, told.get("held"))
        if not reply.has_error():
            kept = {name: record for name, record in reply.content.items() if name != REPORT}
            reply.content = RecordDict(kept)

    def _read(self, reply: Any, blob: bytes, server_round: int) -> tuple[Any, Signature]:
        """The reply with absolute weights in place of its message, and what its metrics look like."""
        if self._manifest is None:
            raise ReplyError("no round was configured. Call configure_train first.")
        metrics = metrics_of(reply.content, self._weight())
        if self.uniform:
            metrics[self._weight()] = 1
        node = reply.metadata.src_node_id
        part = self._part(node, blob, self._manifest, server_round, float(metrics[self._weight()]))
        (delta,) = mosaic.complete([part], self._manifest.parameters)
        self._check_norm(delta)
        arrays = self._absolute(delta, self._manifest)
        self._parts[node] = part
        reply.content = RecordDict({"arrays": arrays, "metrics": metrics})
        return reply, signature(metrics)

    def _part(self, node: int, blob: bytes, manifest: TensorManifest, server_round: int, weight: float) -> mosaic.Part:
        """What a message says, of all coordinates or of a tile."""
        if not mosaic.is_tile(blob, manifest):
            whole = message.dense(message.decode(blob, manifest, self.base, server_round), manifest)
            return mosaic.Part(whole, None, weight)
        if hasattr(self.inner, "strategy"):
            raise PrivacyOrderError(
                f"{type(self.inner).__name__} bounds what each reply can change, but mosaic messages are completed "
                f"from each other, so one client would have a part in several. Use another preset."
            )
        indices, values = mosaic.decompress(blob, manifest, self.base, self._tiles[node])
        if reason := mosaic_reason(type(self.inner)):
            raise ReplyError(reason)
        return mosaic.Part(values, indices, weight)

    def _absolute(self, flat: Any, manifest: TensorManifest) -> Any:
        """An ArrayRecord of the weights that the round began with, plus a delta. Raises MessageValueError."""
        weights = dict[str, Any]()
        for name, delta in manifest.unflatten(flat).items():
            old = self._arrays[name]
            with np.errstate(over="ignore"):
                new = (old.astype(np.float32) + delta).astype(old.dtype)
            if not np.isfinite(new).all():
                raise MessageValueError(f"{name!a} would no longer be finite. Have the client lower its learning rate.")
            weights[name] = Array(new)
        return ArrayRecord(weights)

    def _complete(self, used: list[Any], refused: Counter[str], server_round: int) -> list[Any]:
        """Fill what clients with mosaic messages left to others; returns the replies for which that works.

        What they sent is within max_norm. What is filled in is others', so its norm is not theirs to answer for.
        """
        parts = [self._parts[reply.metadata.src_node_id] for reply in used]
        if self._manifest is None or all(part.indices is None for part in parts):
            return used
        good = list[Any]()
        for reply, whole in zip(used, mosaic.complete(parts, self._manifest.parameters, self.senders), strict=True):
            try:
                arrays = self._absolute(whole, self._manifest)
            except FstqError as error:
                refused[type(error).__name__] += 1
                node = reply.metadata.src_node_id
                log.warning("round %d: reply of node %d is left out, completed: %s", server_round, node, error)
                continue
            reply.content = RecordDict({**dict(reply.content.items()), "arrays": arrays})
            good.append(reply)
        return good

    def _check_norm(self, delta: Any) -> None:
        if self.max_norm is None:
            return
        norm = math.sqrt(float(np.square(delta, dtype=np.float64).sum()))
        if norm > self.max_norm:
            raise MessageValueError(
                f"the update has norm {norm:.3g}, expected at most {self.max_norm:.3g}. Look into this client's "
                f"training, or raise max_norm."
            )

    def _weight(self) -> str:
        """Name of the metric that weighs clients: the innermost strategy's."""
        strategy = self.inner
        while not hasattr(strategy, "weighted_by_key") and hasattr(strategy, "strategy"):
            strategy = strategy.strategy
        return str(getattr(strategy, "weighted_by_key", "num-examples"))
