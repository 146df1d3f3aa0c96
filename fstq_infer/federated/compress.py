"""A client's delta to one message and back: feedback, selection, allocation, codes and the message put together.

>>> blob, state = Compressor(manifest, base).compress(delta, fisher, state, budget=50_000, round=3)
>>> delta = decompress(blob, manifest)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import DeltaError, OptionError
from fstq_infer.federated import message as messages
from fstq_infer.federated import quantize
from fstq_infer.federated.allocate import allocation
from fstq_infer.federated.feedback import ErrorFeedback, Feedback, Floats, Ints, State, feedback
from fstq_infer.federated.header import HEADER_BYTES
from fstq_infer.federated.layer import Layer, starts_of, supports
from fstq_infer.federated.message import Message
from fstq_infer.federated.plan import Allocation, Plan, Problem
from fstq_infer.federated.select import Fisher, Selector, per_tensor, selector
from fstq_infer.federated.tensors import TensorManifest
from fstq_infer.federated.water import WaterFilling

TRIES, MOST_TRIES, FULL, COLUMN_BITS = 5, 32, 0.97, 16
PRESETS: Mapping[str, tuple[str, str, str]] = {  # name -> selector, allocation, feedback
    "fstq": ("fisher", "water", "ef"),
    "top-k": ("magnitude", "fixed", "ef"),
    "paper": ("paper", "paper", "none"),
    "lossless": ("magnitude", "lossless", "none"),
}

Fitted = tuple[bytes, tuple[Layer, ...], Ints]  # a message, its layers, the indices of what they send


@dataclass(frozen=True, slots=True)
class Compressor:
    """Composes the parts of one way to compress; :data:`PRESETS` names some.

    base: the base model's identity, 16 bytes. seed: of selectors that draw; the round is added to it.
    """

    manifest: TensorManifest
    base: bytes
    selector: Selector = field(default_factory=Fisher)
    allocation: Allocation = field(default_factory=WaterFilling)
    feedback: Feedback = field(default_factory=ErrorFeedback)
    seed: int = 0

    @classmethod
    def preset(cls, name: str, manifest: TensorManifest, base: bytes, seed: int = 0) -> Compressor:
        """The parts of one row of :data:`PRESETS`. Raises OptionError with the names there are."""
        if name not in PRESETS:
            raise OptionError(f"there is no preset {name!a}; choose one of {', '.join(PRESETS)}")
        score, plan, memory = PRESETS[name]
        return cls(manifest, base, selector(score), allocation(plan), feedback(memory), seed)

    def compress(
        self,
        delta: Mapping[str, Any],
        fisher: Mapping[str, Any] | None = None,
        state: State | None = None,
        budget: int | None = None,
        round: int = 0,
    ) -> tuple[bytes, State]:
        """The message for a delta, and the state for the next round.

        delta, fisher: floating-point arrays by name, as in the manifest; a Fisher is >= 0. budget: bytes that the whole
        message may have. Raises DeltaError for arrays that do not fit or are not finite, OptionError for a budget that
        cannot hold even an empty message.
        """
        if budget is not None and budget < HEADER_BYTES:
            raise OptionError(f"a message has at least {HEADER_BYTES} bytes, found a budget of {budget}. Raise it.")
        before = state or State()
        for array in (before.residual, before.velocity):
            if array is not None and len(array) != self.manifest.parameters:
                raise DeltaError(
                    f"the client's state is for {len(array)} parameters, expected {self.manifest.parameters}. Drop it."
                )
        update, pending = self.feedback.before(self.manifest.flatten(delta), before)
        weights = None if fisher is None else _weights(self.manifest.flatten(fisher, "Fisher"))
        scores = self.selector(update, weights, self.seed + round)
        problem = Problem(scores, update, weights, self.manifest.sizes)
        blob, layers, sent = self._fit(problem, budget, round)
        values = np.concatenate([np.empty(0, np.float32), *(layer.values() for layer in layers)])
        return blob, self.feedback.after(update, pending, sent, values)

    def _fit(self, problem: Problem, budget: int | None, round: int) -> Fitted:
        """The fullest message within the budget that a few plans give: a plan's bits are only a model of its bytes."""
        best: Fitted | None = None
        columns = len(problem.sizes) * COLUMN_BITS
        bits = None if budget is None else max(8.0 * (budget - HEADER_BYTES) - columns, 64.0)
        plan = self.allocation.planner(problem)
        fits, exceeds = None, None  # bits that did, and that did not
        for number in range(MOST_TRIES):
            layers, sent = _layers(problem, plan(bits))
            blob = messages.encode(Message.of(layers, self.manifest, self.base, round), self.manifest)
            if budget is None or bits is None:
                return blob, layers, sent
            if len(blob) <= budget:
                stalled = best is not None and len(blob) <= len(best[0])  # more bits no longer help
                best = best if stalled else (blob, layers, sent)
                if stalled or len(blob) >= FULL * budget:
                    break
                fits = bits
            else:
                exceeds = bits
            if best is not None and number + 1 >= TRIES:
                break
            if fits and exceeds:
                bits = math.sqrt(fits * exceeds)
            else:
                bits *= min(max(0.99 * budget / len(blob), 0.25), 4.0) if fits else min(0.98 * budget / len(blob), 0.9)
        if best is None:
            empty = Message.of((), self.manifest, self.base, round)
            best = messages.encode(empty, self.manifest), (), np.empty(0, np.int64)
        return best


def decompress(
    blob: bytes, manifest: TensorManifest, base: bytes | None = None, round: int | None = None
) -> dict[str, NDArray[np.float32]]:
    """The delta that a message stands for, by name. Raises MessageError, see :func:`message.decode`."""
    return manifest.unflatten(messages.dense(messages.decode(blob, manifest, base, round), manifest))


def _weights(fisher: Floats) -> Floats:
    """Fisher with mean 1; all ones where it is 0 everywhere. Raises DeltaError for a negative one."""
    if fisher.min() < 0:
        raise DeltaError("the Fisher has negative values, expected squared gradients. Pass means of squares.")
    mean = float(fisher.mean(dtype=np.float64))
    if mean <= 0:
        return np.ones_like(fisher)
    return np.divide(fisher, mean, out=fisher, casting="same_kind")


def _layers(problem: Problem, plan: Plan) -> tuple[tuple[Layer, ...], Ints]:
    """Layers of a plan, without empty ones, and the indices of all that they send, layer by layer."""
    layers, left, indices = list[Layer](), problem.sizes, [np.empty(0, np.int64)]
    found = plan.chosen or per_tensor(problem.scores, problem.sizes, plan.counts)
    for counts, choice, chosen in zip(plan.counts, plan.choice, found, strict=True):
        if not len(chosen):
            continue
        rest = _ranks(len(problem.update), indices)[chosen] if layers else chosen
        positions = rest - np.repeat(starts_of(left), counts)
        weights = None if problem.fisher is None else problem.fisher[chosen]
        exponent, scales, codes, blocks = quantize.apply(problem.update[chosen], counts, plan.names, choice, weights)
        layer = Layer(codes, supports(positions, counts, left), counts, exponent, scales, positions, blocks)
        layers.append(layer)
        indices.append(chosen)
        left = left - counts
    return tuple(layers), np.concatenate(indices)


def _ranks(total: int, taken: list[Ints]) -> Ints:
    """(N,) for each coordinate not taken: how many before it are not taken either."""
    free = np.ones(total, np.int64)
    for indices in taken:
        free[indices] = 0
    return np.cumsum(free) - free
