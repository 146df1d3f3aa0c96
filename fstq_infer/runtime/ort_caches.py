"""How keys and values get from one call of ONNX Runtime to the next. Knows sessions and graph contract 1, no texts.

:class:`ReturnedCaches`: a bundle's own graph returns past and new ones together, in new memory: it copies every cached
token at each call. :class:`SharedCaches`: an engine's graph writes the new ones in place, into memory with some room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import EngineError
from fstq_infer.runtime.engine import Int64

LENGTHS = "past_lengths"  # the input that tells a graph which writes in place: (groups,) int64
SHORTLIST = ("shortlist.ids", "shortlist.logits")  # outputs that such a graph may have
EMPTY: dict[str, tuple[type[np.generic], int]] = {  # a NumPy type of that size, and TensorProto.DataType
    "tensor(int64)": (np.int64, 7),
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
}
ROOM, ROOM_SHARE, SPARE = 64, 16, 4  # spare tokens: at least 64, or 1/16 of what is cached; above 1/4 they are let go
Array = NDArray[Any]


@dataclass(slots=True)
class Graph:
    """A session with its ports by name, cached ones last and in equal order; ``devices``: where each output lies.

    ports: (type, shape) of each cached input. groups: of layers, one more than pruning stages.
    """

    session: Any
    native: Any
    options: Any
    inputs: Sequence[str]
    outputs: Sequence[str]
    ports: Sequence[tuple[str, Sequence[Any]]]
    groups: int
    devices: Sequence[Any]

    @property
    def given(self) -> int:
        """Number of inputs before the cached ones."""
        return len(self.inputs) - len(self.ports)

    @property
    def fetched(self) -> int:
        """Number of outputs before the cached ones: logits, kept indices."""
        return self.groups

    def wrap(self, array: Array, kind: str = "tensor(int64)") -> Any:
        """An OrtValue over the array's own memory, which must outlive it."""
        return self.native.OrtValue.ortvalue_from_numpy_with_onnx_type(array, EMPTY[kind][1])


@dataclass(slots=True, eq=False)  # not frozen: that would triple the time to make one, and each token makes one
class ReturnedCache:
    """A vector of OrtValues; from ``first`` on positions of each group, then key and value of each layer.

    It is what ONNX Runtime returned, as it is: taking a value out of it and dropping it at once costs a quarter of
    keeping them all as Python objects. ``session`` must outlive it. Nothing in it changes.
    """

    batch: int
    values: Any = field(repr=False)
    first: int = field(repr=False)
    groups: int = field(repr=False)
    session: Any = field(repr=False)

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(self.values[i].tensor_size_in_bytes() for i in range(self.first + self.groups, len(self.values)))


class ReturnedCaches:
    """What comes out as ``present.*`` goes in again as ``past_*``, on the device it lies on, never seen as an array."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._empty: dict[int, ReturnedCache] = {}
        self._arrays: list[Array] = []

    def empty(self, batch: int) -> ReturnedCache:
        """A cache without tokens; the same object for the same number of rows."""
        if batch not in self._empty:
            made: dict[tuple[Any, ...], Any] = {}  # layers of one shape share one value
            values = self.graph.native.OrtValueVector()
            for kind, shape in self.graph.ports:
                full = (kind, batch, *shape[1:2], 0, *shape[3:]) if len(shape) == 4 else (kind, batch, 0)
                if full not in made:
                    array = np.empty(full[1:], EMPTY[kind][0])
                    self._arrays.append(array)  # an OrtValue made by ONNX Runtime would have no address: 1.23 minds
                    made[full] = self.graph.wrap(array, kind)
                values.push_back(made[full])
            self._empty[batch] = ReturnedCache(batch, values, 0, self.graph.groups, self.graph.session)
        return self._empty[batch]

    def run(self, given: Sequence[Any], arrays: Sequence[Int64], cache: Any) -> tuple[list[Array], Any, None]:
        """Logits and, for several tokens, kept indices of each stage; the new cache; no shortlist."""
        graph = self.graph
        feeds, fetched = graph.native.OrtValueVector(), graph.native.OrtValueVector()
        feeds.reserve(len(graph.inputs))
        push, cached = feeds.push_back, cache.values
        for value in given:
            push(value)
        for index in range(cache.first, len(cached)):
            push(cached[index])
        graph.session.run_with_ortvaluevector(graph.options, graph.inputs, feeds, graph.outputs, fetched, graph.devices)
        looked_at = graph.fetched if arrays[0].shape[1] > 1 else 1
        found = [fetched[index].numpy() for index in range(looked_at)]  # views of the values' memory
        return found, ReturnedCache(cache.batch, fetched, graph.fetched, graph.groups, graph.session), None


@dataclass(slots=True, eq=False)
class SharedCache:
    """The first ``lengths[group]`` columns of ``buffers``, which later calls leave as they are."""

    batch: int
    buffers: Buffers | None = field(repr=False)
    lengths: tuple[int, ...]
    session: Any = field(repr=False)

    @property
    def bytes(self) -> int:
        """Memory held by keys and values, spare columns included."""
        return 0 if self.buffers is None else sum(array.nbytes for array in self.buffers.arrays if array.ndim == 4)


class Buffers:
    """Positions, keys and values in memory that stays; columns from ``filled`` on are free, their positions -1.

    Bound once as inputs and as outputs; the graph adds columns from ``lengths`` on.
    """

    def __init__(
        self, graph: Graph, batch: int, sizes: Sequence[int], groups: Sequence[int], logits: tuple[str, int, int]
    ) -> None:
        """sizes: columns of each group. groups: of each cached input. logits: type, how many, and in a shortlist."""
        self.graph, self.batch, self.sizes, self.groups = graph, batch, tuple(sizes), groups
        self.filled: tuple[int, ...] | None = (0,) * len(self.sizes)  # None after a call that failed
        self._before = np.zeros(len(self.sizes), np.int64)
        self._begin = self._before.data  # written number by number, which is less work than an assignment
        self.arrays: list[Array] = []
        for (kind, shape), group in zip(graph.ports, groups, strict=True):
            full = (batch, shape[1], self.sizes[group], shape[3]) if len(shape) == 4 else (batch, self.sizes[group])
            # Zeros, as 0 times what happens to lie in free memory may be NaN, masked or not.
            self.arrays.append(np.full(full, -1, np.int64) if len(full) == 2 else np.zeros(full, EMPTY[kind][0]))
        self._values = [graph.wrap(a, kind) for a, (kind, _) in zip(self.arrays, graph.ports, strict=True)]
        kind, vocab, few = logits
        self.logits = np.zeros((batch, 1, vocab), EMPTY[kind][0])
        self._logits = graph.wrap(self.logits, kind)
        shape = (batch, few)
        self.shortlist = (np.zeros(shape, np.int64), np.zeros(shape, np.float32)) if few else None
        self._ones = np.zeros((batch, 1), np.int64)
        self._lengths = graph.wrap(self._before)
        self._single: Any = None
        self._given: Sequence[Any] = ()

    def take(self, other: Buffers, lengths: Sequence[int]) -> None:
        """Copy the first columns of other buffers."""
        for mine, theirs, group in zip(self.arrays, other.arrays, self.groups, strict=True):
            at = (
                (slice(None), slice(lengths[group]))
                if mine.ndim == 2
                else (slice(None), slice(None), slice(lengths[group]))
            )
            mine[at] = theirs[at]
        self.filled = tuple(lengths)

    def bind(self, given: Sequence[Any], lengths: Sequence[int], single: bool) -> Any:
        """A binding of all inputs and outputs; the same one for single tokens. lengths: columns that stay."""
        for group, length in enumerate(lengths):
            self._begin[group] = length
        if single and self._single is not None:
            if given is not self._given:
                self._bind_given(self._single, given)
                self._given = given
            return self._single
        graph, binding = self.graph, self.graph.session.io_binding()
        self._bind_given(binding, given)
        native = binding._iobinding
        native.bind_ortvalue_input(LENGTHS, self._lengths)
        native.bind_ortvalue_output(graph.outputs[0], self._logits)
        for name in graph.outputs[1 : graph.fetched]:
            if single:
                native.bind_ortvalue_output(name, graph.wrap(self._ones))
            else:
                native.bind_output(name, graph.devices[0])
        cached = zip(graph.inputs[graph.given :], graph.outputs[graph.fetched :], self._values, strict=True)
        for name, out, value in cached:  # last: outputs are found again in the order of their binding
            native.bind_ortvalue_input(name, value)
            native.bind_ortvalue_output(out, value)
        if self.shortlist is not None:
            ids, largest = self.shortlist
            native.bind_ortvalue_output(SHORTLIST[0], graph.wrap(ids))
            native.bind_ortvalue_output(SHORTLIST[1], graph.wrap(largest, "tensor(float)"))
        if single:
            self._single, self._given = binding, given
        return binding

    def _bind_given(self, binding: Any, given: Sequence[Any]) -> None:
        for name, value in zip(self.graph.inputs, given, strict=False):
            binding._iobinding.bind_ortvalue_input(name, value)


class SharedCaches:
    """Caches that are views of buffers. Who goes on from the newest one writes behind it; from an older one, a copy."""

    def __init__(self, graph: Graph, layers: Sequence[int], vocab: int) -> None:
        """layers: number of decoder layers in each group."""
        self.graph = graph
        outputs = {output.name: output for output in graph.session.get_outputs()}
        few = outputs[SHORTLIST[0]].shape[1] if SHORTLIST[0] in outputs else 0
        self._logits = (outputs["logits"].type, vocab, few)
        by_layer = [group for group, count in enumerate(layers) for _ in range(2 * count)]
        self._groups = [*range(graph.groups), *by_layer]
        self._one = (1,) * graph.groups
        self._empty: dict[int, SharedCache] = {}

    def empty(self, batch: int) -> SharedCache:
        """A cache without tokens; the same object for the same number of rows."""
        if batch not in self._empty:
            self._empty[batch] = SharedCache(batch, None, (0,) * self.graph.groups, self.graph.session)
        return self._empty[batch]

    def run(self, given: Sequence[Any], arrays: Sequence[Int64], cache: Any) -> tuple[list[Array], Any, Any]:
        """Logits and, for several tokens, kept indices of each stage; the new cache; the shortlist, if there is one.

        Logits and shortlist are valid until the next call.
        """
        graph, lengths, buffers = self.graph, cache.lengths, cache.buffers
        single = arrays[0].shape[1] == 1
        more = self._one if single else self._most(arrays)
        needed = tuple(map(int.__add__, lengths, more))
        if buffers is None or buffers.filled != lengths or any(map(int.__gt__, needed, buffers.sizes)):
            buffers = self._moved(cache, needed)
        binding, buffers.filled = buffers.bind(given, lengths, single), None
        graph.session.run_with_iobinding(binding, graph.options)
        if single:
            buffers.filled = needed
            return [buffers.logits], SharedCache(cache.batch, buffers, needed, cache.session), buffers.shortlist
        outputs = binding._iobinding.get_outputs()
        kept = [outputs[index].numpy().copy() for index in range(1, graph.fetched)]  # .numpy() is a view
        filled = (needed[0], *(length + k.shape[1] for length, k in zip(lengths[1:], kept, strict=True)))
        buffers.filled = filled
        cache = SharedCache(cache.batch, buffers, filled, cache.session)
        if any(
            size > SPARE * ROOM and size * (SPARE - 1) > n * SPARE
            for size, n in zip(buffers.sizes, filled, strict=True)
        ):
            # Fewer stayed than there might have: attention over free columns costs as much as over any.
            cache.buffers = self._moved(cache, filled)
        return [buffers.logits, *kept], cache, buffers.shortlist

    def _most(self, arrays: Sequence[Int64]) -> list[int]:
        """Most tokens that each group can get in this call: of those before, as many as the row with the most asks."""
        most = [arrays[0].shape[1]]
        for stage in range(self.graph.groups - 1):
            asked = arrays[2][:, stage]
            most.append(most[-1] if (asked < 0).any() else min(most[-1], int(asked.max())))
        return most

    def _moved(self, cache: SharedCache, needed: Sequence[int]) -> Buffers:
        """New buffers with room for ``needed`` columns and some more, with the cache's own in it."""
        sizes = [count + max(ROOM, count // ROOM_SHARE) for count in needed]
        try:
            made = Buffers(self.graph, cache.batch, sizes, self._groups, self._logits)
        except MemoryError as error:
            raise EngineError(
                f"there is no memory for the keys and values of {cache.batch} x {max(needed)} tokens; use a shorter "
                "prompt, fewer rows or a smaller keep ratio"
            ) from error
        if cache.buffers is not None:
            made.take(cache.buffers, cache.lengths)
        return made
