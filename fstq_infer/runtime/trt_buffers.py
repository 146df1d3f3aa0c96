"""Memory of a TensorRT engine for one batch size: inputs, outputs, keys and values, and the CUDA graph of a token.

Keys and values have buffers for as many columns as the engine's context. A plan that updates them in place gets them as
input and as output, and sees the first ones, as many as there are positions. Another plan returns new columns, which
are copied behind the old ones; it sees a buffer as wide as it is laid out. Both widths are multiples of BUCKET: free
columns have position -1, so shapes, and with them the CUDA graph, stay the same for that many tokens. Positions are the
host's: those of kept tokens are looked up in the call's own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import EngineError
from fstq_infer.runtime.cuda import ON_DEVICE, RELAXED, TO_DEVICE, TO_HOST, Cuda
from fstq_infer.runtime.engine import Float32, Int64
from fstq_infer.runtime.trt_ports import Ports

if TYPE_CHECKING:
    from fstq_infer.runtime.trt_adapters import Given

BUCKET = 256  # columns


@dataclass(slots=True)
class Bound:
    """An execution context, and which shapes and addresses it has, as a key: () where that is not known."""

    context: Any
    key: tuple[int, ...] = ()


@dataclass(slots=True)
class Owned:
    """What buffers have on the device: it outlives them, so that a finalizer can give it back."""

    cuda: Cuda
    memory: list[int] = field(default_factory=list)  # addresses
    graph: Any = None

    def forget(self) -> None:
        """Destroy the graph."""
        graph, self.graph = self.graph, None
        if graph is not None:
            self.cuda("cudaGraphExecDestroy", graph)

    def free(self) -> None:
        """Give everything back; CUDA waits for what runs."""
        self.forget()
        while self.memory:
            self.cuda("cudaFree", self.memory.pop())


class TrtCache:
    """The first ``lengths[group]`` columns of ``buffers``, which later calls leave as they are."""

    __slots__ = ("batch", "buffers", "engine", "lengths")

    def __init__(self, engine: Any, batch: int, buffers: Buffers | None, lengths: tuple[int, ...]) -> None:
        self.engine, self.batch, self.buffers, self.lengths = engine, batch, buffers, lengths
        if buffers is not None:
            buffers.users += 1

    def __del__(self) -> None:
        if getattr(self, "buffers", None) is not None and self.buffers is not None:
            self.buffers.users -= 1

    @property
    def bytes(self) -> int:
        """Memory that keys and values fill, without free columns of the buffers."""
        if self.buffers is None:
            return 0
        cached = self.buffers.ports.cached
        return sum(self.batch * self.lengths[p.group] * p.heads * p.width * p.size for p in cached)


class Buffers:
    """Everything that a plan reads and writes, for ``batch`` rows. users: caches that still need what is in there.

    A graph holds as long as nobody changes its execution context, so a token has a context of its own here.
    """

    def __init__(self, cuda: Cuda, ports: Ports, batch: int, stream: Any, context: Callable[[], Any]) -> None:
        """context: makes one for a token. Raises EngineError where device memory does not suffice."""
        self.cuda, self.ports, self.batch, self.stream = cuda, ports, batch, stream
        self.users, self.filled = 0, (0,) * ports.groups
        self._owned = Owned(cuda)
        finally_call(self, self._owned.free)
        self._host: dict[str, NDArray[Any]] = {}
        self._address: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._moves = 0
        self._context = context
        self._single: Bound | None = None
        self._given: Given | None = None  # whose memory the addresses are
        self._layout = [0] * ports.groups
        self._sizes = [batch * p.heads * ports.context * p.width * p.size for p in ports.cached]
        for port, size in zip(ports.cached, self._sizes, strict=True):
            self._address[port.name] = self._device(size)
            staged = 0 if ports.in_place else batch * port.heads * ports.prompt * port.width * port.size
            self._address[port.out] = self._address[port.name] if ports.in_place else self._device(staged)
        self._spare = 0 if ports.in_place else self._device(max(self._sizes, default=0))
        self._small()
        self.positions = [np.full((batch, ports.context), -1, np.int64) for _ in range(ports.groups)]
        self.logits: Float32 = self._host["logits"].reshape(batch, ports.vocab)
        self._set("logits", (batch, 1, ports.vocab))

    def _small(self) -> None:
        """Inputs and outputs besides keys and values."""
        ports, batch = self.ports, self.batch
        for name in ("input_ids", "position_ids"):
            self._both(name, batch * ports.prompt)
        if ports.groups > 1:
            self._both("keep", batch * (ports.groups - 1))
        for group in range(ports.groups):
            self._both(f"past_positions.{group}", batch * ports.context)
            out = f"{'present' if ports.in_place else 'new'}_positions.{group}"
            self._address[out] = self._device(8 * batch * max(ports.context, ports.prompt))
            if ports.in_place:
                self._both(f"past_rows.{group}", batch)
                self._set(f"past_rows.{group}", (batch,))
            if group:
                self._both(f"kept_indices.{group}", batch * ports.prompt)
                self._both(f"columns.{group}", ports.prompt)
                self._host[f"columns.{group}"][:] = np.arange(ports.prompt)
                self._copy(f"columns.{group}", TO_DEVICE, 8 * ports.prompt)
        self._both("logits", batch * ports.vocab, np.float32)
        self.cuda("cudaStreamSynchronize", self.stream)  # columns never change

    def reset(self) -> None:
        """Hold nothing."""
        self.filled, self._layout = (0,) * self.ports.groups, [0] * self.ports.groups
        for positions in self.positions:
            positions[:] = -1

    def take_over(self, other: Buffers, lengths: Sequence[int]) -> None:
        """Hold the first ``lengths`` columns of other buffers."""
        for port, size in zip(self.ports.cached, self._sizes, strict=True):
            addresses = self._address[port.name], other._address[port.name]
            self.cuda("cudaMemcpyAsync", *addresses, size, self.cuda.kind(ON_DEVICE), self.stream)
        self._layout = list(other._layout)
        for mine, theirs, length in zip(self.positions, other.positions, lengths, strict=True):
            mine[:, :length] = theirs[:, :length]
        self.filled = tuple(lengths)
        self.cuda("cudaStreamSynchronize", self.stream)

    def run(
        self, prefill: Bound, input_ids: Int64, position_ids: Int64, keep: Int64, most: Sequence[int], given: Given
    ) -> tuple[Int64, ...] | None:
        """One call behind what is held; most: columns that each group gets. Returns what each stage kept.

        prefill: context of many tokens. given: adapters.

        None where TensorRT refuses to run; nothing is held then.
        """
        lengths, self.filled = self.filled, ()
        if given is not self._given:
            self._given = given
            self._address |= given.addresses
            self._shapes |= given.shapes
        self._write(input_ids, position_ids, keep, most, lengths)
        single = input_ids.shape[1] == 1
        if not (self._token(given.number) if single else self._enqueue(prefill, first=True)):
            return None
        self.cuda("cudaStreamSynchronize", self.stream)
        kept = self._kept(position_ids, most, single)
        ends = [self._behind(0, lengths[0], position_ids, 0, most[0])]
        for group, found in enumerate(kept, 1):
            dropped = 0 if self.ports.in_place else _padding(found)
            found = found[:, dropped:]
            at = np.take_along_axis(position_ids, np.maximum(found, 0), axis=1)
            ends.append(self._behind(group, lengths[group], np.where(found < 0, -1, at), dropped, most[group]))
        self.filled = tuple(ends)
        return tuple(found[:, _padding(found) :] for found in kept) if not single else kept

    def _write(self, ids: Int64, positions: Int64, keep: Int64, most: Sequence[int], lengths: Sequence[int]) -> None:
        """Put a call's numbers where they are uploaded from, and note all shapes."""
        ports = self.ports
        self._put("input_ids", ids)
        self._put("position_ids", positions)
        if ports.groups > 1:
            self._put("keep", keep)
        for group, length in enumerate(lengths):
            width = self._wide(length + most[group]) if ports.in_place else self._layout[group]
            self._put(f"past_positions.{group}", self.positions[group][:, :width])
            if ports.in_place:
                self._host[f"past_rows.{group}"][:] = length
            if group:
                self._set(f"columns.{group}", (most[group],))
                self._set(f"kept_indices.{group}", (self.batch, most[group]))
        for port in ports.cached:
            columns = ports.context if ports.in_place else self._layout[port.group]
            self._set(port.name, (self.batch, port.heads, columns, port.width))

    def _token(self, adapters: int) -> bool:
        """A call of one token: by a CUDA graph, from the second one in a row in the same shapes on."""
        if self._single is None:
            self._single = Bound(self._context())
        bound, owned = self._single, self._owned
        widths = [self._shapes[f"past_positions.{group}"][1] for group in range(self.ports.groups)]
        key = (*widths, self._moves, adapters)
        if bound.key != key:
            owned.forget()
            if not self._enqueue(bound, first=True):
                return False
            bound.key = key
            return True
        if owned.graph is None:
            owned.graph = self._capture(bound)
        self.cuda("cudaGraphLaunch", owned.graph, self.stream)
        return True

    def _capture(self, bound: Bound) -> Any:
        """A graph of this call, in which nothing runs yet. Raises EngineError where TensorRT refuses to run."""
        mode = self.cuda.runtime.cudaStreamCaptureMode(RELAXED)
        self.cuda("cudaStreamBeginCapture", self.stream, mode)
        try:
            done = self._enqueue(bound, first=False)
        finally:
            graph = self.cuda("cudaStreamEndCapture", self.stream)
        try:
            if not done:
                raise EngineError("TensorRT failed while a CUDA graph of a token was captured; its log says why")
            return self.cuda("cudaGraphInstantiate", graph, 0)
        finally:
            self.cuda("cudaGraphDestroy", graph)

    def _enqueue(self, bound: Bound, first: bool) -> bool:
        """Upload, compute, download. first: in these shapes and with these addresses."""
        inputs, context = self.ports.inputs, bound.context
        if first:
            bound.key = ()
            for name in inputs:
                context.set_input_shape(name, self._shapes[name])
            for name, address in self._address.items():
                if not context.set_tensor_address(name, address):
                    return False
        for name in inputs:
            if name in self._host and not name.startswith("columns."):
                self._copy(name, TO_DEVICE, 8 * int(np.prod(self._shapes[name])))
        if not context.execute_async_v3(self.stream):
            return False
        self._copy("logits", TO_HOST, self._host["logits"].nbytes)
        if self._shapes["input_ids"][1] > 1:
            for group in range(1, self.ports.groups):
                name = f"kept_indices.{group}"
                self._copy(name, TO_HOST, 8 * int(np.prod(self._shapes[name])))
        return True

    def _kept(self, position_ids: Int64, most: Sequence[int], single: bool) -> tuple[Int64, ...]:
        """Columns of the call that each stage kept, -1 for padding; a single token stays."""
        if single:
            return (np.minimum(position_ids, 0),) * (self.ports.groups - 1)
        found = []
        for group in range(1, self.ports.groups):
            count = self.batch * most[group]
            found.append(self._host[f"kept_indices.{group}"][:count].reshape(self.batch, -1).copy())
        return tuple(found)

    def _behind(self, group: int, length: int, positions: Int64, dropped: int, most: int) -> int:
        """Note the positions of new columns and, where the plan has not, put those behind the old ones; new length."""
        end = length + int(positions.shape[1])
        self.positions[group][:, length:end] = positions
        if self.ports.in_place or end == length:
            return end
        if end > self._layout[group]:
            self._widen(group, length, self._wide(end))
        width = self._layout[group]
        for port in self.ports.cached:
            if port.group == group:
                c = port.width * port.size
                to, source = self._address[port.name] + length * c, self._address[port.out] + dropped * c
                self._copy_2d(to, width * c, source, most * c, (end - length) * c, self.batch * port.heads)
        return end

    def _widen(self, group: int, length: int, width: int) -> None:
        """Lay a group's buffers out for more columns; free ones are zeros, as 0 times NaN would be NaN."""
        for port, size in zip(self.ports.cached, self._sizes, strict=True):
            if port.group != group:
                continue
            c, old = port.width * port.size, self._address[port.name]
            self.cuda("cudaMemsetAsync", self._spare, 0, size, self.stream)
            if length:
                rows = self.batch * port.heads
                self._copy_2d(self._spare, width * c, old, self._layout[group] * c, length * c, rows)
            self._address[port.name], self._spare = self._spare, old
        self._layout[group] = width
        self._moves += 1

    def _wide(self, columns: int) -> int:
        return int(min(self.ports.context, -(-columns // BUCKET) * BUCKET))

    def _set(self, name: str, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape

    def _put(self, name: str, values: Int64) -> None:
        """Values, row by row, into memory that is uploaded from."""
        self._host[name][: values.size].reshape(values.shape)[...] = values
        self._set(name, values.shape)

    def _copy(self, name: str, kind: int, size: int) -> None:
        host, device = self._host[name].ctypes.data, self._address[name]
        ends = (device, host) if kind == TO_DEVICE else (host, device)
        if size:
            self.cuda("cudaMemcpyAsync", *ends, size, self.cuda.kind(kind), self.stream)

    def _copy_2d(self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int) -> None:
        kind = self.cuda.kind(ON_DEVICE)
        self.cuda("cudaMemcpy2DAsync", to, to_pitch, source, pitch, width, rows, kind, self.stream)

    def _device(self, size: int) -> int:
        address = self.cuda.allocate(size)
        self._owned.memory.append(address)
        return address

    def _both(self, name: str, count: int, kind: Any = np.int64) -> None:
        """Memory on the device and pinned memory of the host."""
        size = count * np.dtype(kind).itemsize
        self._address[name] = self._device(size)
        address = int(self.cuda("cudaMallocHost", size))
        block = (ctypes.c_byte * size).from_address(address)
        finally_call(block, self.cuda, "cudaFreeHost", address)  # with the last view of it: logits outlive buffers
        self._host[name] = np.frombuffer(block, kind)
        self._host[name][:] = 0


def finally_call(of: Any, call: Any, *arguments: Any) -> None:
    """Call once ``of`` is gone; not at exit, where the process gives all back and the driver may be gone already."""
    weakref.finalize(of, call, *arguments).atexit = False


def _padding(found: Int64) -> int:
    """Columns in front that are nobody's, where nobody knew how many tokens would stay."""
    return int((found < 0).all(axis=0).sum())
