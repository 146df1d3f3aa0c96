"""Adapters as OrtValues: what a session is given for its inputs ``lora.*``. Knows no cache and no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.adapters.store import Adapter
from fstq_infer.errors import EngineError
from fstq_infer.runtime.ort_caches import EMPTY, Graph

REMEMBERED = 8  # combinations of adapters
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """Adapters ready to be given: OrtValues in the order of the inputs, then of ``probes``. arrays: their memory.

    rows: of the batch that they are for, 1: of any.
    """

    values: tuple[Any, ...]
    probes: tuple[str, ...]
    rows: int
    arrays: tuple[Array, ...]


class Matrices:
    """Values for the inputs of one graph. An adapter is wrapped where it lies; a mixed batch is put together once."""

    def __init__(self, graph: Graph, ports: LoraPorts, kind: str) -> None:
        """kind: the type of the inputs, as ONNX Runtime names it."""
        self._graph, self._ports, self._kind = graph, ports, kind
        self._bound: dict[tuple[int, ...], tuple[Sequence[Adapter | None], Bound]] = {}
        self.none = self._bind((None,)).values

    def bound(self, adapters: Sequence[Adapter | None]) -> Bound:
        """adapters: of each row, or one for all."""
        rows = tuple(adapters[:1]) if all(one is adapters[0] for one in adapters) else tuple(adapters)
        key = tuple(map(id, rows))
        if key not in self._bound:
            while len(self._bound) >= REMEMBERED:
                self._bound.pop(next(iter(self._bound)))
            self._bound[key] = (rows, self._bind(rows))  # holding the adapters keeps their ids theirs
        return self._bound[key][1]

    def _bind(self, rows: Sequence[Adapter | None]) -> Bound:
        dtype = np.dtype(EMPTY[self._kind][0])
        arrays: list[Array] = []
        for one in self._ports.linears:
            a, b = one.ports
            pairs = [(row.arrays[a], row.arrays[b]) if row is not None and a in row.arrays else None for row in rows]
            if len(rows) == 1 and pairs[0] is not None:
                arrays += [pairs[0][0][None], pairs[0][1][None]]
                continue
            rank = max((len(pair[1]) for pair in pairs if pair is not None), default=0)
            both = np.zeros((len(rows), one.inputs, rank), dtype), np.zeros((len(rows), rank, one.outputs), dtype)
            for row, pair in enumerate(pairs):
                if pair is not None:
                    both[0][row, :, : len(pair[1])], both[1][row, : len(pair[1])] = pair
            arrays += both
        values = [self._graph.wrap(array, self._kind) for array in arrays]
        probed = {id(row) for row in rows if row is not None and row.probe}
        probes: tuple[str, ...] = ()
        if probed:
            if len({id(row) if row is not None and row.probe else None for row in rows}) > 1:
                raise EngineError("rows whose adapters bring different probes cannot share a batch; run them apart")
            first = rows[0]
            probes = tuple(sorted(name for name in self._ports.probes if first is not None and name in first.arrays))
            for name in probes:
                arrays.append(first.arrays[name] if first is not None else np.empty(0))
                values.append(self._graph.wrap(arrays[-1], "tensor(float)"))
        return Bound(tuple(values), probes, len(rows), tuple(arrays))
