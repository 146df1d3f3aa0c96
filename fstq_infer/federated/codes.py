"""The codes of a message: what a symbol of each means. Rows are added at the end; ids are part of the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError

# Dettmers et al., QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Code:
    """One row of the table of codes in docs/wire-format.md.

    symbols: size A of the alphabet, 0 for raw values. signed: a sign beside each symbol. learned: the A magnitudes
    travel in the message; else ``table`` holds the A values. raw: dtype of a raw value.
    """

    id: int
    name: str
    symbols: int = 0
    signed: bool = False
    learned: bool = False
    table: tuple[float, ...] = ()
    raw: str = ""

    @property
    def scaled(self) -> bool:
        """Whether values are multiplied by the tensor's scale."""
        return self.symbols > 0

    @property
    def bits(self) -> int:
        """Bits of one value before entropy coding, sign included."""
        return 8 * np.dtype(self.raw).itemsize if self.raw else (self.symbols - 1).bit_length() + self.signed

    @property
    def table_bits(self) -> int:
        """Bits that a layer spends once on this code's magnitudes and frequencies."""
        return 16 * self.symbols * self.learned + 13 * self.symbols * (self.symbols > 1)

    def values(self, block: Block) -> NDArray[np.float32]:
        """(m,) values of a block's coordinates, without scales."""
        if self.name == "bf16":
            return (block.raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if self.raw:
            return block.raw.astype(np.float32, copy=False)
        table = block.table.astype(np.float32) if self.learned else np.array(self.table, np.float32)
        if not self.signed:
            return table.take(block.symbols)
        table = np.concatenate((table, -table))
        if self.symbols == 1:
            return table.take(block.signs)
        return table.take(block.symbols + np.uint8(self.symbols) * block.signs)


def _empty(dtype: str) -> NDArray[Any]:
    return np.empty(0, dtype)


@dataclass(frozen=True, slots=True)
class Block:
    """What one code of a layer holds for its m coordinates, those of the tensors that use it, in manifest order.

    table: (A,) float16 magnitudes of a learned code. frequencies: (A,) that sum to 4096, where A > 1. symbols, signs:
    (m,) uint8. raw: (m,) float32, float16, or the uint16 bits of bf16. What the code does not use is empty.
    """

    table: NDArray[np.float16]
    frequencies: NDArray[np.int64]
    symbols: NDArray[np.uint8]
    signs: NDArray[np.uint8]
    raw: NDArray[Any]

    @classmethod
    def of(
        cls,
        table: NDArray[Any] | None = None,
        frequencies: NDArray[Any] | None = None,
        symbols: NDArray[Any] | None = None,
        signs: NDArray[Any] | None = None,
        raw: NDArray[Any] | None = None,
    ) -> Block:
        """A block with empty arrays for what is not given."""
        return cls(
            _empty("f2") if table is None else table,
            _empty("i8") if frequencies is None else frequencies,
            _empty("u1") if symbols is None else symbols,
            _empty("u1") if signs is None else signs,
            _empty("u1") if raw is None else raw,
        )


def _uniform(id: int, name: str, half: int) -> Code:
    return Code(id, name, 2 * half + 1, table=tuple(step / half for step in range(-half, half + 1)))


ROWS = (
    Code(1, "fp32", raw="f4"),
    Code(2, "fp16", raw="f2"),
    Code(3, "bf16", raw="u2"),
    Code(4, "lloyd1", 1, signed=True, learned=True),
    Code(5, "lloyd2", 2, signed=True, learned=True),
    Code(6, "lloyd3", 4, signed=True, learned=True),
    Code(7, "lloyd4", 8, signed=True, learned=True),
    Code(8, "lloyd8", 128, signed=True, learned=True),
    Code(9, "nf4", 16, table=NF4),
    _uniform(10, "int2", 1),
    _uniform(11, "int4", 7),
    _uniform(12, "int8", 127),
)
CODES: Mapping[str, Code] = {code.name: code for code in ROWS}
BY_ID: Mapping[int, Code] = {code.id: code for code in ROWS}


def code(name: str) -> Code:
    """A row by name. Raises OptionError with the names there are."""
    if name not in CODES:
        raise OptionError(f"there is no code {name!a}; choose one of {', '.join(CODES)}")
    return CODES[name]
