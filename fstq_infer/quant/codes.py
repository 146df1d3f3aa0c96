"""Weights to codes and back. Matrices are (outputs, inputs); scales are half precision and belong to a block of a row.

Scales are searched to minimise an importance-weighted error, and rounding can pass each column's error on to columns
that were not rounded yet, as far as the inputs' second moments say that they can make up for it (optimal brain
surgeon; the column order of GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.quant.formats import Format

Matrix = NDArray[np.float32]
Codes = NDArray[Any]  # int8, or half precision
RATIOS = np.linspace(1.15, 0.55, 19, dtype=np.float32)  # of the scale that just reaches the largest weight of a block
WEIGHTS_AT_ONCE = 1 << 22  # that are rounded, or become numbers again, at a time
LAZY = 64  # columns between two updates of all later ones
DAMPING = 0.01  # of the mean second moment, added to each
SMALLEST, LARGEST_SHORT = np.float16(2.0**-24), np.float32(15 << 12)  # the latter: of four significant bits
INPUT_LEVELS, TINY = 127, np.float32(1e-30)  # of an input that is rounded to int8; a largest input that stays above 0


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix in a format.

    codes: (rows, columns) int8 in the format's levels; for fp32, fp16 and fp8 numbers (of fp8 in half precision, which
    holds them all), for bf16 their upper 16 bits.
    scales: (rows, blocks) half precision, None for formats without.
    """

    format: Format
    codes: NDArray[np.generic]
    scales: NDArray[np.float16] | None = None

    def dequantize(self) -> Matrix:
        """(rows, columns) as a runtime computes with."""
        if self.scales is None:
            if self.format.name == "bf16":
                return (self.codes.astype(np.uint32) << 16).view(np.float32)
            return self.codes.astype(np.float32)
        columns = self.codes.shape[1]
        numbers = np.empty(self.codes.shape, np.float32)
        for part in _parts(*self.codes.shape):
            np.multiply(self.codes[part], _spread(self.scales[part], self.format, columns), out=numbers[part])
        return numbers

    def rows(self, indices: NDArray[np.int64]) -> Quantized:
        """The matrix of some of its rows, in that order."""
        scales = None if self.scales is None else self.scales[indices]
        return Quantized(self.format, self.codes[indices], scales)


def quantize(
    weight: Matrix, form: Format, importance: Matrix | None = None, moments: NDArray[np.float64] | None = None
) -> Quantized:
    """weight: (rows, columns). importance: the same shape, or (columns,): what an error of each weight costs, squared.

    moments: (columns, columns) second moments of the inputs; with them, rounding errors make up for each other.
    """
    if not form.is_scaled:
        return Quantized(form, _narrow(weight, form))
    scales = search_scales(weight, form, importance)
    if moments is None:
        return Quantized(form, round_to(weight, scales, form), scales)
    return Quantized(form, compensated(weight, scales, form, moments), scales)


def _narrow(weight: Matrix, form: Format) -> NDArray[np.generic]:
    """Numbers of a floating-point format; bf16 rounds to nearest even, halves stop at their largest number."""
    if form.name == "fp32":
        return weight.astype(np.float32)
    if form.name == "fp16":
        largest = float(np.finfo(np.float16).max)
        return np.clip(weight, -largest, largest).astype(np.float16)
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _spread(scales: NDArray[np.float16], form: Format, columns: int) -> Matrix:
    """(rows, blocks) -> (rows, columns)."""
    return np.repeat(scales.astype(np.float32), form.block or columns, axis=1)[:, :columns]


def _in_blocks(matrix: Matrix, form: Format) -> Matrix:
    """(rows, columns) -> (rows, blocks, block), zeros behind the last column."""
    rows, columns = matrix.shape
    block = form.block or columns
    padded = np.pad(matrix, ((0, 0), (0, -columns % block)))
    return np.ascontiguousarray(padded.reshape(rows, -1, block))


def search_scales(weight: Matrix, form: Format, importance: Matrix | None = None) -> NDArray[np.float16]:
    """(rows, blocks) scales of least weighted error, among fractions of the largest weight's, refitted to their codes.

    Without importance all weights count alike.
    """
    found = []
    for rows in _parts(*weight.shape):
        part = weight[rows]
        if importance is None or importance.ndim == 1:
            cost = np.broadcast_to(np.float32(1.0) if importance is None else importance, part.shape)
        else:
            cost = importance[rows]
        found.append(_search(_in_blocks(part, form), _in_blocks(np.asarray(cost, np.float32), form), form))
    scales = np.concatenate(found)
    if form.scale_bits == 8:  # all of them normal numbers of E4M3, times one power of two
        scales = np.maximum(scales, np.float16(max(2.0**-20, float(scales.max()) * 2.0**-13)))
    return scales


def _search(blocks: Matrix, cost: Matrix, form: Format) -> NDArray[np.float16]:
    # A weight that no sample touched still counts a little: among equals the plain error decides.
    cost = cost + (1e-3 * cost.mean(-1, keepdims=True) + np.float32(1e-30))
    peak = np.abs(blocks).max(-1) / np.float32(form.largest)
    best = _stored(peak, form)
    least = np.full(best.shape, np.inf, np.float32)
    for ratio in RATIOS:
        codes = form.nearest(blocks / _stored(peak * ratio, form).astype(np.float32)[..., None])
        weighted = cost * codes
        norm = (weighted * codes).sum(-1)
        fitted = _stored((weighted * blocks).sum(-1) / np.maximum(norm, np.float32(1e-38)), form)
        error = (cost * (blocks - fitted.astype(np.float32)[..., None] * codes) ** 2).sum(-1)
        better = (error < least) & (norm > 0)
        best, least = np.where(better, fitted, best), np.where(better, error, least)
    return best


def _stored(scales: Matrix, form: Format) -> NDArray[np.float16]:
    """Scales as they are stored: positive half precision numbers, of four significant bits where they have eight."""
    if form.scale_bits == 8:
        fraction, exponent = np.frexp(np.minimum(scales, LARGEST_SHORT))
        scales = np.ldexp(np.rint(fraction * 16) / 16, exponent)
    return np.clip(scales, float(SMALLEST), float(np.finfo(np.float16).max)).astype(np.float16)


def round_to(weight: Matrix, scales: NDArray[np.float16], form: Format) -> Codes:
    """(rows, columns) nearest codes."""
    codes: Codes = np.empty(weight.shape, _kind(form))
    for part in _parts(*weight.shape):
        codes[part] = form.nearest(weight[part] / _spread(scales[part], form, weight.shape[1]))
    return codes


def _kind(form: Format) -> type[np.int8] | type[np.float16]:
    """What holds a format's codes."""
    return np.float16 if form.bits == 8 and form.floats is not None else np.int8


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Rows that are looked at together, so that what is computed of them stays small."""
    step = max(1, WEIGHTS_AT_ONCE // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def rounded_inputs(inputs: Matrix, form: Format) -> Matrix:
    """(tokens, columns) as an engine's kernels see them: int8 codes, the largest input of a block sets their scale."""
    if form.inputs is None:
        return inputs
    columns = inputs.shape[1]
    block = min(form.inputs or columns, columns)
    blocks = np.pad(inputs, ((0, 0), (0, -columns % block))).reshape(len(inputs), -1, block)
    steps = np.maximum(np.abs(blocks).max(-1, keepdims=True), TINY) / np.float32(INPUT_LEVELS)
    return np.asarray((np.rint(blocks / steps) * steps).reshape(len(inputs), -1)[:, :columns], np.float32)


def compensated(weight: Matrix, scales: NDArray[np.float16], form: Format, moments: NDArray[np.float64]) -> Codes:
    """(rows, columns) codes, rounded column by column, heaviest inputs first, each error passed on to later columns."""
    order = np.argsort(-np.diag(moments), kind="stable")
    work = weight[:, order].astype(np.float32)
    spread = _spread(scales, form, weight.shape[1])[:, order]
    factor = _carry(moments[np.ix_(order, order)])
    codes: Codes = np.zeros(weight.shape, _kind(form))
    columns = weight.shape[1]
    for start in range(0, columns, LAZY):
        end = min(start + LAZY, columns)
        errors = np.empty((len(work), end - start), np.float32)
        for j in range(start, end):
            rounded = form.nearest(work[:, j] / spread[:, j])
            codes[:, order[j]] = rounded
            errors[:, j - start] = (work[:, j] - rounded * spread[:, j]) / factor[j, j]
            work[:, j + 1 : end] -= errors[:, j - start, None] * factor[j, j + 1 : end]
        work[:, end:] -= errors @ factor[start:end, end:]
    return codes


def _carry(moments: NDArray[np.float64]) -> Matrix:
    """Upper Cholesky factor of the inverse of the damped moments: how an error in one column moves to later ones."""
    size = len(moments)
    damped = moments + np.eye(size) * (DAMPING * float(np.trace(moments)) / size + 1e-12)
    # inverse = U^T U with U upper triangular: flip, so that one lower factor and one triangular inverse are enough.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1], np.float32)
