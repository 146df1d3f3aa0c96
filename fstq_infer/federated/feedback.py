"""What a client remembers of what it did not send. Pure: arrays and state in, arrays and a new state out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class State:
    """Memory of one client between rounds: (N,) residual and (N,) velocity, None before anything was sent."""

    residual: Floats | None = None
    velocity: Floats | None = None


class Feedback(Protocol):
    """Two pure steps around compression.

    before: (N,) delta and the state -> (N,) update to compress, an array of its own, and the state that goes with it.
    after: that update and state, with the (n,) indices sent and their (n,) values as decoded -> the next state. It may
    reuse the update's memory.
    """

    def before(self, delta: Floats, state: State) -> tuple[Floats, State]: ...

    def after(self, update: Floats, state: State, sent: Ints, values: Floats) -> State: ...


@dataclass(frozen=True, slots=True)
class Forget:
    """No feedback: what is not sent is lost."""

    def before(self, delta: Floats, state: State) -> tuple[Floats, State]:
        return delta, State()

    def after(self, update: Floats, state: State, sent: Ints, values: Floats) -> State:
        return State()


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What was not sent is added to the next update, times ``decay`` (Karimireddy et al., arXiv 1901.09847).

    decay: below 1 old errors fade, which helps clients that are drawn rarely.
    """

    decay: float = 1.0

    def before(self, delta: Floats, state: State) -> tuple[Floats, State]:
        if state.residual is None:
            return delta, State()
        return delta + np.float32(self.decay) * state.residual, State()

    def after(self, update: Floats, state: State, sent: Ints, values: Floats) -> State:
        update[sent] -= values
        return State(residual=update)


@dataclass(frozen=True, slots=True)
class MomentumMasked:
    """Momentum on the client, forgotten where it was sent: momentum correction and factor masking of Deep Gradient
    Compression (Lin et al., arXiv 1712.01887).
    """

    momentum: float = 0.9

    def before(self, delta: Floats, state: State) -> tuple[Floats, State]:
        velocity = delta if state.velocity is None else np.float32(self.momentum) * state.velocity + delta
        update = velocity.copy() if state.residual is None else state.residual + velocity
        return update, State(velocity=velocity)

    def after(self, update: Floats, state: State, sent: Ints, values: Floats) -> State:
        velocity = np.zeros_like(update) if state.velocity is None else state.velocity.copy()
        velocity[sent] = 0
        update[sent] -= values
        return State(residual=update, velocity=velocity)


FEEDBACKS: Mapping[str, Feedback] = {
    "none": Forget(),
    "ef": ErrorFeedback(),
    "decayed": ErrorFeedback(decay=0.9),
    "momentum-masked": MomentumMasked(),
}


def feedback(name: str) -> Feedback:
    """A row by name. Raises OptionError with the names there are."""
    if name not in FEEDBACKS:
        raise OptionError(f"there is no feedback {name!a}; choose one of {', '.join(FEEDBACKS)}")
    return FEEDBACKS[name]
