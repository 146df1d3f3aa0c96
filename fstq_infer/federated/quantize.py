"""From values to the symbols, scales and tables of a code. Each quantizer is a row of :data:`QUANTIZERS`.

Several may write the same code: what differs is how a scale is chosen. Decoding is in codes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import DeltaError, OptionError
from fstq_infer.federated import ans
from fstq_infer.federated.codes import Block, Code, code
from fstq_infer.federated.layer import MAX_EXPONENT, MIN_EXPONENT, Ints, pieces, scaled, starts_of
from fstq_infer.federated.lloyd import HALF_LARGEST, HALF_SMALLEST, lloyd_max, nearest

Floats = NDArray[np.float32]
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


class Quantizer(Protocol):
    """Writes one code.

    wanted: (m,) values of tensors with ``counts`` (T',) coordinates each, all > 0 -> (T',) float64 scales.
    block: (m,) values, (m,) scales as the decoder will see them, (m,) weights of squared errors or None -> Block.
    """

    @property
    def code(self) -> Code: ...

    def wanted(self, values: Floats, counts: Ints) -> NDArray[np.float64]: ...

    def block(self, values: Floats, scales: Floats, weights: Floats | None) -> Block: ...


def _maxima(values: Floats, counts: Ints) -> NDArray[np.float64]:
    return np.maximum.reduceat(np.abs(values), starts_of(counts)).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Raw:
    """Values as they are, in one of the floating-point formats; ``fp32`` loses nothing."""

    code: Code

    def wanted(self, values: Floats, counts: Ints) -> NDArray[np.float64]:
        return np.zeros(len(counts))

    def block(self, values: Floats, scales: Floats, weights: Floats | None) -> Block:
        if self.code.name == "bf16":
            bits = values.view(np.uint32)
            # Round to nearest, ties to even; what would become infinite stays the largest finite number.
            rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            raw = (rounded >> np.uint32(16)).astype(np.uint16)
            return Block.of(raw=np.where((raw & 0x7F80) == 0x7F80, (raw & 0x8000) | 0x7F7F, raw).astype(np.uint16))
        limit = np.finfo(self.code.raw).max
        return Block.of(raw=np.clip(values, -limit, limit).astype(self.code.raw))


@dataclass(frozen=True, slots=True)
class Lloyd:
    """Sign and one of K magnitudes that minimise the squared error over the layer (Lloyd 1982; Max 1960).

    A tensor's scale is its mean magnitude; the table is shared by all tensors of the code.
    """

    code: Code

    def wanted(self, values: Floats, counts: Ints) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.add.reduceat(np.abs(values), starts_of(counts), dtype=np.float64)
        return sums / counts

    def block(self, values: Floats, scales: Floats, weights: Floats | None) -> Block:
        magnitudes = np.minimum(np.abs(values) / scales, HALF_LARGEST).astype(np.float16)
        bins = magnitudes.view(np.uint16)
        mass = np.bincount(bins, weights, minlength=1 << 15)
        table = lloyd_max(mass, self.code.symbols)
        signs = np.signbit(values).view(np.uint8)
        if self.code.symbols == 1:
            return Block.of(table, signs=signs)
        symbols = nearest(table).take(bins)
        return Block.of(table, ans.frequencies(symbols, self.code.symbols), symbols, signs)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly spaced values up to the largest magnitude: the rule of Fed-FSTQ (arXiv 2604.25421) and of most others."""

    code: Code

    def wanted(self, values: Floats, counts: Ints) -> NDArray[np.float64]:
        return _maxima(values, counts)

    def block(self, values: Floats, scales: Floats, weights: Floats | None) -> Block:
        half = self.code.symbols // 2
        symbols = (_steps(values, scales, half) + half).astype(np.uint8)
        return Block.of(frequencies=ans.frequencies(symbols, self.code.symbols), symbols=symbols)


def _steps(values: Floats, scales: Floats | np.float32, half: int) -> Floats:
    steps: Floats = np.clip(np.rint(values / scales * np.float32(half)), -half, half)
    return steps


@dataclass(frozen=True, slots=True)
class Clipped(Uniform):
    """Evenly spaced values up to the share of the largest magnitude that gives the smallest squared error."""

    def wanted(self, values: Floats, counts: Ints) -> NDArray[np.float64]:
        highest, half, starts = _maxima(values, counts), self.code.symbols // 2, starts_of(counts)
        spread = np.repeat(np.maximum(highest, np.finfo(np.float32).tiny).astype(np.float32), counts)
        shares, best, least = values / spread, highest, np.full(len(counts), np.inf)
        for clip in CLIPS:
            errors = np.square(_steps(shares, np.float32(clip), half) * np.float32(clip / half) - shares)
            total: NDArray[np.float64] = np.add.reduceat(errors, starts, dtype=np.float64)
            best, least = np.where(total < least, highest * clip, best), np.minimum(total, least)
        return best


@dataclass(frozen=True, slots=True)
class NormalFloat:
    """Quantiles of a normal law, absmax scaled: NF4 of QLoRA (Dettmers et al., arXiv 2305.14314)."""

    code: Code

    def wanted(self, values: Floats, counts: Ints) -> NDArray[np.float64]:
        return _maxima(values, counts)

    def block(self, values: Floats, scales: Floats, weights: Floats | None) -> Block:
        table = np.array(self.code.table)
        edges = ((table[1:] + table[:-1]) / 2).astype(np.float32)
        symbols = np.searchsorted(edges, values / scales).astype(np.uint8)
        return Block.of(frequencies=ans.frequencies(symbols, self.code.symbols), symbols=symbols)


QUANTIZERS: Mapping[str, Quantizer] = {
    **{name: Raw(code(name)) for name in ("fp32", "fp16", "bf16")},
    **{name: Lloyd(code(name)) for name in ("lloyd1", "lloyd2", "lloyd3", "lloyd4", "lloyd8")},
    "nf4": NormalFloat(code("nf4")),
    **{name: Clipped(code(name)) for name in ("int2", "int4", "int8")},
    **{f"uniform{bits}": Uniform(code(f"int{bits}")) for bits in (2, 4, 8)},
}


def quantizer(name: str) -> Quantizer:
    """A row by name. Raises OptionError with the names there are."""
    if name not in QUANTIZERS:
        raise OptionError(f"there is no quantizer {name!a}; choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def half_scales(wanted: NDArray[np.float64]) -> tuple[int, NDArray[np.float16]]:
    """(exponent, (T,) float16) nearest to the wanted scales, all > 0; the largest lies in [1, 2) x 2^exponent.

    Raises DeltaError for scales that only a diverged delta can have.
    """
    highest = float(wanted.max(initial=0.0))
    if highest >= 2.0 ** (MAX_EXPONENT + 1):
        raise DeltaError(f"the delta has magnitudes near {highest:.1e}: training has diverged. Skip this round's step.")
    exponent = max(int(np.frexp(highest)[1]) - 1, MIN_EXPONENT) if highest else 0
    with np.errstate(under="ignore"):
        scales = np.ldexp(wanted, -exponent).astype(np.float16)
    return exponent, np.maximum(scales, HALF_SMALLEST)


def apply(
    values: Floats, counts: Ints, names: Mapping[int, str], choice: NDArray[Any], weights: Floats | None = None
) -> tuple[int, NDArray[np.float16], NDArray[np.uint8], dict[int, Block]]:
    """(exponent, (T,) scales, (T,) code ids, blocks by id) of n values in tensor order.

    names: number -> quantizer; choice: (T,) number of each tensor, 0 for one without coordinates. weights: (n,).
    """
    tensors = len(counts)
    wanted, codes, blocks = np.zeros(tensors), np.zeros(tensors, np.uint8), dict[int, Block]()
    chosen = {number: np.flatnonzero(choice == number) for number in names}
    chosen = {number: order for number, order in chosen.items() if len(order)}
    for number, order in chosen.items():
        kind = quantizer(names[number])
        wanted[order], codes[order] = kind.wanted(pieces(values, counts, order), counts[order]), kind.code.id
    exponent, scales = half_scales(wanted)
    as_read = np.ldexp(scales.astype(np.float32), exponent)
    for number, order in chosen.items():
        kind = quantizer(names[number])
        mine = None if weights is None else pieces(weights, counts, order)
        spread = np.repeat(as_read[order], counts[order])
        blocks[kind.code.id] = kind.block(pieces(values, counts, order), spread, mine)
    return exponent, np.where(scaled(codes), scales, np.float16(0)), codes, blocks
