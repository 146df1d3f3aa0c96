"""Adapters on the device: what a TensorRT plan is given for its inputs ``lora.*``. Knows no cache and no text.

The plan has one rank for all layers, so matrices are padded with zeros to the largest; rank 0 is no adapter. Weights of
probes that adapters may replace are inputs, too; the bundle's own lie beside the plan.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters import tensors
from fstq_infer.errors import AdapterFormatError, EngineError
from fstq_infer.runtime.cuda import TO_DEVICE, Cuda
from fstq_infer.runtime.engine import Adapted, Int64, Step
from fstq_infer.runtime.trt_buffers import TrtCache, finally_call
from fstq_infer.runtime.trt_ports import Matrix, Ports

if TYPE_CHECKING:
    from fstq_infer.adapters.store import Adapter
    from fstq_infer.runtime.trt import TrtEngine

PROBES = "probes.safetensors"
REMEMBERED = 4  # combinations of adapters that stay on the device
ALIGNED = 256
Array = NDArray[Any]


class Given:
    """Shapes and addresses of inputs, in one block of device memory that goes with this.

    rows: of the batch that it is for, 1: of any. number: no other of the same engine has it.
    """

    def __init__(self, cuda: Cuda, stream: Any, arrays: Mapping[str, Array], rows: int, number: int) -> None:
        self.rows, self.number = rows, number
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.addresses: dict[str, int] = {}
        if not arrays:
            return
        places = list(itertools.accumulate((-(-a.nbytes // ALIGNED) * ALIGNED for a in arrays.values()), initial=0))
        address = cuda.allocate(places[-1])
        finally_call(self, cuda, "cudaFree", address)
        self.addresses = {name: address + place for name, place in zip(arrays, places, strict=False)}
        if places[-1]:
            _upload(cuda, stream, address, places, list(arrays.values()))


class Matrices:
    """What the inputs of one plan are given. A combination of adapters is put together and uploaded once."""

    def __init__(self, cuda: Cuda, stream: Any, ports: Ports, directory: Path) -> None:
        """Raises EngineError where the probes beside the plan are damaged."""
        self._cuda, self._stream, self._ports = cuda, stream, ports
        self._count = itertools.count()
        self._probes = _defaults(directory / PROBES, ports.probes)
        self._bound: dict[tuple[int, ...], tuple[Sequence[Adapter | None], Given]] = {}
        self.none = self._bind((None,))

    def bound(self, adapters: Sequence[Adapter | None]) -> Given:
        """adapters: of each row, or one for all. Raises EngineError for what the engine was not built for."""
        rows = tuple(adapters[:1]) if all(one is adapters[0] for one in adapters) else tuple(adapters)
        key = tuple(map(id, rows))
        if key not in self._bound:
            self._check(rows)
            while len(self._bound) >= REMEMBERED:
                self._bound.pop(next(iter(self._bound)))
            self._bound[key] = (rows, self._bind(rows))  # holding the adapters keeps their ids theirs
        return self._bound[key][1]

    def _check(self, rows: Sequence[Adapter | None]) -> None:
        ports = self._ports
        if not ports.loras:
            raise EngineError(
                "the engine has no inputs for adapters. Export the model again with --adapter, or with "
                "--adapter-targets all, and build it"
            )
        if len(rows) > ports.batch:
            raise EngineError(f"{len(rows)} rows have adapters, the engine was built for {ports.batch}")
        for one in rows:
            rank = _rank(one)
            if one is not None and rank > ports.rank:
                raise EngineError(
                    f"adapter {one.name!a} has rank {rank}, the engine was built for at most {ports.rank}. Build one "
                    f"with --rank {rank}"
                )
        probed = {id(row) if row is not None and row.probe else 0 for row in rows}
        if len(probed) > 1:
            raise EngineError("rows whose adapters bring different probes cannot share a batch; run them apart")

    def _bind(self, rows: Sequence[Adapter | None]) -> Given:
        rank = max(map(_rank, rows))
        arrays = {matrix.name: _stacked(matrix, rows, rank) for matrix in self._ports.loras}
        own = rows[0].arrays if rows[0] is not None and rows[0].probe else self._probes
        for matrix in self._ports.probes:
            found = own.get(matrix.name)
            if found is None or found.shape != matrix.shape:
                raise EngineError(f"an adapter's {matrix.name} does not fit the engine. Add the adapter again")
            arrays[matrix.name] = converted(found, matrix, "a probe")
        return Given(self._cuda, self._stream, arrays, len(rows), next(self._count))


class TrtAdapted(Adapted["TrtEngine"]):
    """A :class:`TrtEngine` with adapters given."""

    def __init__(self, engine: TrtEngine, given: Given) -> None:
        self._engine, self._given = engine, given

    def empty_cache(self, batch: int) -> TrtCache:
        """A cache without tokens for as many rows as there are adapters, or for any number where there is one."""
        self._fits(batch)
        return self._engine.empty_cache(batch)

    def forward(self, input_ids: Int64, position_ids: Int64, keep: Int64, cache: Any) -> Step:
        """Run one call, see :meth:`TrtEngine.forward`."""
        self._fits(len(input_ids))
        return self._engine.run(input_ids, position_ids, keep, cache, self._given)

    def adapted(self, adapters: Sequence[Adapter | None]) -> TrtEngine | TrtAdapted:
        """Other adapters in place of these."""
        return self._engine.adapted(adapters)

    def _fits(self, batch: int) -> None:
        if self._given.rows not in (1, batch):
            raise EngineError(f"{self._given.rows} rows have adapters, but there are {batch} rows; expected as many")


def _upload(cuda: Cuda, stream: Any, address: int, places: Sequence[int], arrays: Sequence[Array]) -> None:
    """All arrays by one copy, from pinned memory."""
    size = places[-1]
    pinned = int(cuda("cudaMallocHost", size))
    try:
        block = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pinned))
        for place, array in zip(places, arrays, strict=False):
            block[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        cuda("cudaMemcpyAsync", address, pinned, size, cuda.kind(TO_DEVICE), stream)
        cuda("cudaStreamSynchronize", stream)
    finally:
        cuda("cudaFreeHost", pinned)


def _rank(adapter: Adapter | None) -> int:
    """The largest of a layer."""
    if adapter is None:
        return 0
    return max((len(array) for name, array in adapter.arrays.items() if name.endswith(".B")), default=0)


def _stacked(matrix: Matrix, rows: Sequence[Adapter | None], rank: int) -> Array:
    """(rows, inputs, rank) or (rows, rank, outputs), zeros where a row's adapter leaves the layer as it is."""
    shape = tuple(rank if extent < 0 else extent for extent in matrix.shape[1:])
    made = np.zeros((len(rows), *shape), matrix.dtype)
    for row, adapter in enumerate(rows):
        array = adapter.arrays.get(matrix.name) if adapter is not None else None
        if adapter is None or array is None:
            continue
        if array.ndim != 2 or any(f != n for f, n in zip(array.shape, matrix.shape[1:], strict=True) if n >= 0):
            raise EngineError(f"adapter {adapter.name!a} does not fit the engine: {matrix.name} is {array.shape}")
        made[row, : array.shape[0], : array.shape[1]] = converted(array, matrix, f"adapter {adapter.name!a}")
    return made


def converted(array: Array, matrix: Matrix, whose: str) -> Array:
    """The numbers as the plan takes them; bfloat16, which NumPy lacks, as its bits, rounded to the nearest even.

    Raises EngineError where they are too large.
    """
    if matrix.kind != "BF16":
        with np.errstate(over="ignore"):
            made = np.asarray(array).astype(matrix.dtype)
    else:
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        made = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    large = ~np.isfinite(made) if matrix.kind != "BF16" else (made & 0x7FFF) >= 0x7F80
    if large.any():
        raise EngineError(f"{whose} has weights that are too large for {matrix.name} in half precision")
    return made


def _defaults(path: Path, wanted: Sequence[Matrix]) -> dict[str, Array]:
    """The bundle's own probes, as the build wrote them."""
    if not wanted:
        return {}
    try:
        found = {name: tensor.array() for name, tensor in tensors.read(path).items()}
    except AdapterFormatError as error:
        raise EngineError(f"{path} is damaged: {error} Build the engine again") from error
    if {name: array.shape for name, array in found.items()} != {one.name: one.shape for one in wanted}:
        raise EngineError(f"{path} does not hold the probes of the plan beside it. Build the engine again")
    return found
