"""Heads that share keys and values become rows of one head where a single token is decoded.

ONNX Runtime's Attention reads a key-value head once for each query head. (B, H, 1, D) queries over G key-value heads
are (B, G, H / G, D) just as well, and then it is read once. Of longer calls heads stay as they are: their mask would
have to be repeated. Shapes decide at run time, so one graph serves both.

One layer, 14 query and 2 key heads of 64, one thread, microseconds (onnxruntime 1.32), one core, least of several:

| cached | Attention | queries grouped |
|---|---|---|
| 320 | 58 | 33 |
| 1,088 | 170 | 93 |
| 4,200 | 700 | 337 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fstq_engines.graph import initializer

LOWEST = float(np.finfo(np.float32).min)


class GroupedQueries:
    """Makes Attention nodes of one graph; what nodes with the same mask need is computed once.

    single: whether queries are float32. Masks of grouped ones are numbers then: reading truth values costs a layer 6 us
    of 27 at 320 cached tokens and 32 of 82 at 1,088 (two threads).
    """

    def __init__(self, graph: ir.Graph, single: bool = False) -> None:
        self.graph, self.single = graph, single
        self._shared: dict[tuple[ir.Value, int, int], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def way(
        self,
        tape: ir.tape.Tape,
        states: Sequence[ir.Value | None],
        mask: ir.Value | None,
        heads: tuple[int, int] | None,
        attributes: dict[str, Any],
    ) -> Callable[[ir.tape.Tape], ir.Value]:
        """What makes (B, H, S, D) on a tape; ``tape`` gets what is shared, which comes before all that is so made.

        states: queries, keys and values, heads apart. heads: H and G, None where not known.
        """
        if mask is None or heads is None or heads[0] == heads[1] or heads[0] % heads[1] or not _one_for_all(mask):
            return lambda inner: inner.op("Attention", [*states, mask], attributes)
        apart, together, rows = self._shapes(tape, mask, *heads)

        def grouped(inner: ir.tape.Tape) -> ir.Value:
            query = inner.op("Reshape", [states[0], together])
            return inner.op("Reshape", [inner.op("Attention", [query, *states[1:], rows], attributes), apart])

        return grouped

    def _shapes(self, tape: ir.tape.Tape, mask: ir.Value, heads: int, groups: int) -> tuple[ir.Value, ...]:
        """(shape of the queries as they were, shape of grouped ones, mask of grouped ones)."""
        key = mask, heads, groups
        if key not in self._shared:
            alone = tape.op("Equal", [tape.op("Shape", [mask], {"start": 2, "end": 3}), self._ints(1)])

            def where(then: tuple[int, ...], otherwise: tuple[int, ...]) -> ir.Value:
                return tape.op("Where", [alone, self._ints(*then), self._ints(*otherwise)])

            apart = where((0, heads, 1, -1), (0, 0, 0, -1))
            together = where((0, groups, heads // groups, -1), (0, 0, 0, -1))
            repeats = where((1, 1, heads // groups, 1), (1, 1, 1, 1))
            allowed = tape.op("Where", [mask, self._number(0), self._number(LOWEST)]) if self.single else mask
            self._shared[key] = apart, together, tape.op("Expand", [allowed, repeats])
        return self._shared[key]

    def _number(self, number: float) -> ir.Value:
        return initializer(self.graph, f"fstq/grouped/{number:g}", np.array(number, np.float32))

    def _ints(self, *numbers: int) -> ir.Value:
        return initializer(self.graph, f"fstq/grouped/{numbers}", np.array(numbers, np.int64))


def _one_for_all(mask: ir.Value) -> bool:
    """Whether (B, 1, S, T) is known to be one mask for all heads: it was made of one without a place for heads."""
    made = mask.producer()
    if made is None or made.op_type != "Unsqueeze" or made.inputs[1] is None:
        return False
    axes = made.inputs[1].const_value
    return axes is not None and axes.numpy().tolist() == [1]
