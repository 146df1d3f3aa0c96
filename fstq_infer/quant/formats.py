"""The formats a weight matrix can be stored in, and what each costs. A new format is one row here.

A matrix has outputs as rows and inputs as columns; a scale belongs to a row, or to a block of neighbours in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError, suggestion


@dataclass(frozen=True, slots=True)
class Minifloat:
    """Floating-point numbers of few bits, without infinities (OCP Microscaling 1.0, section 5.3).

    mantissa: stored bits of it. lowest: exponent of the smallest normal number. largest: number.
    """

    mantissa: int
    lowest: int
    largest: float

    def nearest(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rounded to the nearest such number, ties to the even mantissa; beyond the largest to it."""
        size = np.minimum(np.abs(numbers), np.float32(self.largest))
        exponent = np.maximum(np.frexp(size)[1] - 1, self.lowest)
        step = np.ldexp(np.float32(1), exponent - self.mantissa)
        return np.asarray(np.copysign(np.rint(size / step) * step, numbers), np.float32)


E4M3 = Minifloat(3, -6, 448.0)
E2M1_TWICE = Minifloat(1, 1, 12.0)  # E2M1 times two: whole numbers


@dataclass(frozen=True, slots=True)
class Format:
    """bits: of one code. block: columns that share a scale, 0 for a whole row; None for numbers that need none.

    inputs: neighbours among a token's inputs that share a scale where an engine for the CPU rounds them to int8, 0 for
    all of them; None where they stay as they are.
    floats: what codes are where they are no integers. scale_bits: of one scale; 8: halves with four significant bits,
    so that each is E4M3 times a power of two that the whole matrix shares.
    """

    name: str
    bits: int
    block: int | None = None
    inputs: int | None = None
    floats: Minifloat | None = None
    scale_bits: int = 16

    @property
    def is_scaled(self) -> bool:
        """Whether it has codes and scales."""
        return self.block is not None

    @property
    def is_integer(self) -> bool:
        """Whether it has integer codes and scales."""
        return self.is_scaled and self.floats is None

    @property
    def levels(self) -> tuple[int, int]:
        """Lowest and highest integer code. Of int8 -128 stays free, so that products of two codes fit kernels."""
        high = 2 ** (self.bits - 1) - 1
        return (-high - 1 if self.bits < 8 else -high), high

    @property
    def largest(self) -> float:
        """Code."""
        return self.levels[1] if self.floats is None else self.floats.largest

    def nearest(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        """Nearest codes of weights over their scale."""
        return np.clip(np.rint(numbers), *self.levels) if self.floats is None else self.floats.nearest(numbers)

    def blocks(self, columns: int) -> int:
        """Scales of one row."""
        return 0 if self.block is None else -(-columns // (self.block or columns))

    def bytes(self, rows: int, columns: int) -> int:
        """Size of a matrix with its scales; codes are packed."""
        codes = -(-rows * columns * self.bits // 8)
        return codes + rows * self.blocks(columns) * self.scale_bits // 8


_ALL = (
    Format("fp32", 32),
    Format("fp16", 16),
    Format("bf16", 16),
    Format("int8", 8, 0, inputs=128),
    Format("int8-dynamic", 8, 0, inputs=0),
    Format("int4-32", 4, 32, inputs=32),
    Format("int4-64", 4, 64, inputs=64),
    Format("int4-128", 4, 128, inputs=128),
    Format("fp8", 8, 0, floats=E4M3),
    Format("nvfp4", 4, 16, floats=E2M1_TWICE, scale_bits=8),
)
FORMATS: Mapping[str, Format] = {one.name: one for one in _ALL}
CPU_FORMATS = tuple(one.name for one in _ALL if one.floats is None)  # for which ONNX Runtime has kernels


def named(name: str, what: str = "format") -> Format:
    """The format of that name. Raises OptionError with a suggestion."""
    if name in FORMATS:
        return FORMATS[name]
    raise OptionError(f"there is no {what} {name!a}; {suggestion(name, FORMATS)}")
