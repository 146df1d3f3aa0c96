"""Waiting for replies: for all of them, or for enough of them, and never longer than a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5


def collect(
    grid: Any,
    requests: Iterable[Any],
    timeout: float,
    enough: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Any]:
    """Send requests and return the replies that came within ``timeout`` seconds.

    enough: stop as soon as so many replies without an error are there, however many are on their way; None waits for
    all. A reply that comes later is never pulled, and its client is told with its next request that it was not used.
    """
    waiting = set(grid.push_messages(requests))
    asked, replies, good, until = len(waiting), list[Any](), 0, clock() + timeout
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
            good += not reply.has_error()
        if not waiting or (enough is not None and good >= enough):
            break
        left = until - clock()
        if left <= 0:
            break
        sleep(min(POLL_SECONDS, left))
    if waiting:
        log.info("%d of %d replies, %d not waited for", len(replies), asked, len(waiting))
    return replies
