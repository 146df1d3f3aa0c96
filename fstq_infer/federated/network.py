"""What a round costs in time and energy on given links: a virtual clock. Knows no models and sends nothing.

>>> network = Network(lte(20, seed=0), compute=Compute(0.05), seed=0)
>>> done = network.round(1, {client: Work(downlink=185_000, uplink=4_000, steps=10) for client in drawn})
>>> done.seconds, done.arrived, network.clock
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fstq_infer.errors import OptionError, suggestion

MEGABIT = 125_000.0  # bytes
RADIO_WATTS = 2.0


@dataclass(frozen=True, slots=True)
class Link:
    """One client's connection. uplink, downlink: bytes per second. latency: seconds, one way.

    slow: probability that it is a straggler in a round; its speeds are then divided by ``factor``.
    """

    uplink: float
    downlink: float
    latency: float = 0.05
    slow: float = 0.0
    factor: float = 4.0

    def __post_init__(self) -> None:
        if not (0 < self.uplink < float("inf") and 0 < self.downlink < float("inf") and 0 <= self.latency < 3600):
            raise OptionError(
                f"a link of {self.uplink} and {self.downlink} bytes per second with {self.latency} s latency: expected "
                f"speeds above 0 and a latency of 0 or more"
            )
        if not 0 <= self.slow <= 1 or self.factor < 1:
            raise OptionError(f"slow {self.slow}, factor {self.factor}: expected a probability and 1 or more")


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds of one training step on a client: measured on the device that is meant, or stated.

    spread: of the clients' speeds, the standard deviation of their logarithm. watts: while it computes.
    """

    step: float
    spread: float = 0.0
    watts: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.step < float("inf") or self.spread < 0 or self.watts < 0:
            raise OptionError(f"step {self.step} s, spread {self.spread}, watts {self.watts}: expected 0 or more")


@dataclass(frozen=True, slots=True)
class Work:
    """What one client does in a round: bytes that it receives, local steps, bytes that it sends."""

    downlink: int
    uplink: int
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Passed:
    """A round that is over. seconds: from its start to the last reply waited for. joules: of all clients together.

    arrived: clients whose reply came in time, ascending. lost: those that dropped out, or whose message was lost.
    late: those that came after the deadline. uplink, downlink: bytes on the air, lost and late ones included.
    """

    seconds: float
    joules: float
    arrived: tuple[int, ...]
    lost: tuple[int, ...]
    late: tuple[int, ...]
    uplink: int
    downlink: int


@dataclass
class Network:
    """Links of clients 0, 1, ..., and a clock that goes on round by round.

    dropout: probability that a client takes its request and is gone. loss: that a reply is sent but does not arrive;
    the server then waits for it until the deadline. deadline: seconds after which a round goes on; None: a server
    that knows at once that nothing more will come, which favours no method. radio: watts while sending or receiving.
    The same seed and round give the same draws, whatever was asked before.
    """

    links: Sequence[Link]
    compute: Compute = field(default_factory=lambda: Compute(0.0))
    dropout: float = 0.0
    loss: float = 0.0
    deadline: float | None = None
    radio: float = RADIO_WATTS
    seed: int = 0
    clock: float = 0.0
    joules: float = 0.0

    def __post_init__(self) -> None:
        if not self.links:
            raise OptionError("a network has at least one link, found none")
        for name, value in (("dropout", self.dropout), ("loss", self.loss)):
            if not 0 <= value < 1:
                raise OptionError(f"{name} is {value}, expected a probability from 0 to below 1")
        if self.deadline is not None and self.deadline <= 0:
            raise OptionError(f"a deadline of {self.deadline} s, expected a number above 0, or None")

    def fate(self, number: int, client: int) -> tuple[bool, bool]:
        """(drops out, loses its reply) in a round."""
        gone, lost, _ = self._draws(number, client)
        return gone < self.dropout, lost < self.loss

    def seconds(self, number: int, client: int, work: Work) -> float:
        """From the request to the reply's arrival, if it arrives."""
        down, compute, up = self._parts(number, client, work)
        return 2 * self.links[client].latency + down + compute + up

    def round(self, number: int, work: Mapping[int, Work]) -> Passed:
        """Let the clients of a round work at the same time; the clock moves on to the round's end."""
        arrived, lost, late = list[int](), list[int](), list[int]()
        waited, joules, up, down = 0.0, 0.0, 0, 0
        for client in sorted(work):
            mine = work[client]
            receive, compute, send = self._parts(number, client, mine)
            drops, loses = self.fate(number, client)
            down += mine.downlink
            joules += self.radio * receive
            if drops:
                lost.append(client)
                continue
            up += mine.uplink
            joules += self.radio * send + self.compute.watts * compute
            taken = self.seconds(number, client, mine)
            if loses:
                lost.append(client)
            elif self.deadline is not None and taken > self.deadline:
                late.append(client)
            else:
                arrived.append(client)
                waited = max(waited, taken)
        if self.deadline is not None and len(arrived) < len(work):
            waited = self.deadline
        self.clock += waited
        self.joules += joules
        return Passed(waited, joules, tuple(arrived), tuple(lost), tuple(late), up, down)

    def _parts(self, number: int, client: int, work: Work) -> tuple[float, float, float]:
        """Seconds to receive, to compute and to send."""
        link = self.links[client]
        factor = link.factor if self._draws(number, client)[2] < link.slow else 1.0
        speed = np.random.default_rng((self.seed, 1, client)).normal()
        compute = work.steps * self.compute.step * float(np.exp(self.compute.spread * speed))
        return work.downlink / link.downlink * factor, compute, work.uplink / link.uplink * factor

    def _draws(self, number: int, client: int) -> tuple[float, float, float]:
        gone, lost, slow = np.random.default_rng((self.seed, 0, number, client)).random(3).tolist()
        return gone, lost, slow


def lte(clients: int, seed: int = 0) -> list[Link]:
    """Uplinks of 0.5 to 20 Mbps, log-normal around 5; downlinks four times as fast; one round in ten four times slower.

    Figures in the range of drive tests of LTE; they are a model, not a measurement.
    """
    rng = np.random.default_rng((seed, 2))
    speeds = np.clip(np.exp(rng.normal(np.log(5.0), 0.9, clients)), 0.5, 20.0) * MEGABIT
    latencies = np.clip(np.exp(rng.normal(np.log(0.05), 0.4, clients)), 0.02, 0.3)
    return [Link(up, 4 * up, wait, slow=0.1) for up, wait in zip(speeds.tolist(), latencies.tolist(), strict=True)]


def fixed(clients: int, seed: int = 0) -> list[Link]:
    """20 Mbps both ways for all, 20 ms, no stragglers."""
    return [Link(20 * MEGABIT, 20 * MEGABIT, 0.02)] * clients


LINKS: Mapping[str, Callable[[int, int], list[Link]]] = {"lte": lte, "fixed": fixed}


def links(name: str, clients: int, seed: int = 0) -> list[Link]:
    """A row of :data:`LINKS` by name. Raises OptionError with the names there are."""
    if name not in LINKS:
        raise OptionError(f"there are no links {name!a}; {suggestion(name, LINKS)}")
    return LINKS[name](clients, seed)
