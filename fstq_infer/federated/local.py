"""A Flower Grid that runs ClientApps in this process, one after the other: simulation without Ray.

Requests and replies go through Flower's own serialization, so the bytes counted are those of its objects; the network
below them (HTTP, TLS) is not simulated. Node ids are 2, 3, ...: the same run gives the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fstq_infer.federated.flower import Context, Error, ErrorCode, Grid, Message, RecordDict

log = logging.getLogger(__name__)
FIRST = 2  # node 1 is the server's
App = Callable[[Any, Any], Any]  # a ClientApp: (message, context) -> reply
Fault = Callable[[Any], Any]  # what happens to a reply on its way; None: it is lost


class LocalGrid(Grid):  # type: ignore[misc]  # Flower is not type-checked here
    """Runs ``app`` for each of ``clients`` nodes when a message is pushed to it.

    run_config, node_config: what each Context holds; ``partition-id`` (0, 1, ...) and ``num-partitions`` are added.
    fault: applied to every reply as it arrives. downlink, uplink: bytes of all requests and replies so far.
    """

    def __init__(
        self,
        app: App,
        clients: int,
        run_config: Mapping[str, Any] | None = None,
        node_config: Mapping[str, Any] | None = None,
        fault: Fault | None = None,
    ) -> None:
        _identify()
        self.app, self.fault = app, fault
        self.downlink = self.uplink = 0
        self._run: Any = None
        self._number, self._replies = 0, dict[str, Any]()
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={**(node_config or {}), "partition-id": node - FIRST, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node in range(FIRST, FIRST + clients)
        }

    def set_run(self, run: Any) -> None:
        """Kept, not used."""
        self._run = run

    @property
    def run(self) -> Any:
        """What :meth:`set_run` was given."""
        return self._run

    def create_message(
        self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Any:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ascending."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        """Run the nodes; an exception of the app becomes an error reply, as in a SuperNode."""
        ids = list[str]()
        for message in messages:
            self._number += 1
            ids.append(str(self._number))
            request, size = through_wire(message, ids[-1])
            self.downlink += size
            try:
                answer = self.app(request, self._contexts[message.metadata.dst_node_id])
            except Exception as error:  # whatever an app raises costs its node only
                log.exception("node %d", message.metadata.dst_node_id)
                code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                answer = Message(Error(code=code, reason=f"{type(error).__name__}: {error}"), reply_to=request)
            reply, size = through_wire(answer, f"{ids[-1]}-reply")
            self.uplink += size
            if self.fault is not None:
                reply = self.fault(reply)
            if reply is not None:
                self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        """Replies that have arrived and were not pulled before."""
        return [self._replies.pop(id) for id in sorted(message_ids, key=int) if id in self._replies]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        """All replies; nothing is waited for."""
        return self.pull_messages(self.push_messages(messages))


def through_wire(message: Any, id: str) -> tuple[Any, int]:
    """(the message as its receiver reads it, bytes of all objects that it was sent as)."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    size = sum(len(content) for content in contents.values())
    received = inflate_object_from_contents(message.object_id, contents)
    received.metadata.__dict__["_message_id"] = id  # the id that a SuperLink would have given it
    return received, size


def _identify() -> None:
    """Give this process the identity that Flower's own runners give theirs; messages cannot be made without."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
