"""What a backend has to offer to the runtime: the engine protocol. Knows graph contract 1, no backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import EngineError

if TYPE_CHECKING:
    from fstq_infer.adapters.store import Adapter

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stage:
    """One pruning stage: before decoder layer ``layer``; the first ``sink`` and last ``window`` tokens always stay."""

    layer: int
    sink: int
    window: int


class Cache(Protocol):
    """Keys, values and positions of one batch; immutable, so that one cache can be continued in several ways."""

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""


@dataclass(slots=True, eq=False)  # not frozen: that would triple the time to make one, and each token makes one
class Step:
    """Result of one call.

    logits: (batch, vocab) float32 of each row's last token; the next call may write into the same memory.
    kept: for each stage, (batch, kept) columns of the call's ids that stayed, -1 for padding.
    cache: what the next call continues from.
    shortlist: where the backend picks them, ids and values (batch, n) of each row's largest logits, the largest first,
    of equal ones that of the lower id. Values are NaN where any of all the logits is not finite.
    """

    logits: Float32
    kept: tuple[Int64, ...]
    cache: Any
    shortlist: tuple[Int64, Float32] | None = None


def check_call(input_ids: Int64, position_ids: Int64, keep: Int64, batch: int, stages: int) -> None:
    """Raise EngineError where the arrays of a call do not fit a cache of ``batch`` rows, or the pruning stages."""
    shape = input_ids.shape
    if len(shape) != 2 or shape[0] != batch or shape[1] < 1 or position_ids.shape != shape:
        raise EngineError(
            f"input_ids {shape} and position_ids {position_ids.shape} do not fit a cache of {batch} rows; "
            f"expected ({batch}, sequence) twice"
        )
    if keep.shape != (batch, stages):
        raise EngineError(f"keep has the shape {keep.shape}, expected {(batch, stages)}: rows, pruning stages")
    if shape[1] > 1 and (position_ids[:, 1:] < position_ids[:, :-1]).any():
        raise EngineError("positions fall within a row; expected padding (-1) in front, then ascending positions")


class Engine(Protocol):
    """A loaded engine. One engine may serve many caches; calls are not concurrent."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The graph's pruning stages, in layer order."""

    @property
    def max_positions(self) -> int:
        """Longest context in tokens, generated ones included."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    def empty_cache(self, batch: int) -> Cache:
        """A cache without tokens for ``batch`` rows."""

    def forward(self, input_ids: Int64, position_ids: Int64, keep: Int64, cache: Cache) -> Step:
        """Run one call: ids and positions (batch, sequence), keep (batch, stages); see docs/bundle-format.md.

        keep: counts of tokens, or where negative shares of the score mass in millionths. The arrays may be written
        again after the call.
        """

    def adapted(self, adapters: Sequence[Adapter | None]) -> Engine:
        """The same engine with an adapter for each row of a batch, or one for all rows; None: the model as it is.

        A cache holds what its adapters made of the tokens: go on from it with the same ones. Raises EngineError for an
        engine without inputs for adapters, and for rows whose adapters bring different probes.
        """


E = TypeVar("E", bound=Engine)


class Adapted(Generic[E]):
    """What an engine with adapters given says of itself: what the engine itself says."""

    _engine: E

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The graph's pruning stages, in layer order."""
        return self._engine.stages

    @property
    def max_positions(self) -> int:
        """Longest context in tokens, generated ones included."""
        return self._engine.max_positions

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._engine.vocab_size
