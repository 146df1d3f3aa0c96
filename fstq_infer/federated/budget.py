"""How many bytes a client's message may have: what its uplink carries in the time that a round grants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fstq_infer.errors import OptionError

OVERHEAD = 1024  # bytes of Flower's own around a message: 795 measured, with two metrics
LEAST = 256  # bytes of a message that says anything at all


@dataclass(frozen=True, slots=True)
class UplinkBudgets:
    """bytes = seconds x bytes per second - Flower's overhead, between ``lowest`` and ``highest``.

    seconds: what one upload may take. table: bytes per second by node id; it goes before what clients report. assumed:
    bytes per second of a client of which nothing is known. lowest: a client slower than that takes longer than
    ``seconds``; it is not left out.
    """

    seconds: float = 1.0
    assumed: float = 50_000.0
    table: Mapping[int, float] = field(default_factory=dict)
    lowest: int = 1_024
    highest: int = 1 << 24

    def __post_init__(self) -> None:
        for node, speed in {-1: self.assumed, **self.table}.items():
            if not 0 < speed < float("inf"):
                who = "assumed" if node == -1 else f"of node {node}"
                raise OptionError(f"the uplink {who} is {speed} bytes per second, expected a number above 0")
        if not 0 < self.seconds < float("inf"):
            raise OptionError(f"an upload may take {self.seconds} seconds, expected a number above 0")
        if not LEAST <= self.lowest <= self.highest < 1 << 32:
            raise OptionError(
                f"budgets from {self.lowest} to {self.highest} bytes, expected {LEAST} <= lowest <= highest < 4 GiB"
            )

    def bytes_for(self, node: int, reported: float | None = None) -> int:
        """Budget of one client's message. reported: the bytes per second it has told, None where it has not."""
        speed = self.table.get(node, self.assumed if reported is None else reported)
        return min(max(int(min(self.seconds * speed, 2.0**40)) - OVERHEAD, self.lowest), self.highest)


@dataclass(frozen=True, slots=True)
class SameBudget:
    """The same bytes for every client; 0: as many as its message takes (for codecs that must leave nothing out)."""

    size: int

    def __post_init__(self) -> None:
        if self.size and self.size < LEAST:
            raise OptionError(f"a budget of {self.size} bytes, expected 0 (no limit) or at least {LEAST}")

    def bytes_for(self, node: int, reported: float | None = None) -> int:
        return self.size
