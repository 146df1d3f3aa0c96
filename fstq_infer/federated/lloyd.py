"""Lloyd-Max magnitudes for a histogram over the 32,768 non-negative float16 numbers.

Binning by float16 is a cast, keeps 11 bits of every magnitude and makes choosing a symbol one table look-up.
Lloyd, Least squares quantization in PCM (1982); Max, Quantizing for minimum distortion (1960).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 60
HALF_LARGEST = np.float32(np.finfo(np.float16).max)
HALF_SMALLEST = np.finfo(np.float16).smallest_subnormal
FINITE = 0x7C00  # patterns below are finite


def _points() -> NDArray[np.float64]:
    return np.arange(FINITE, dtype=np.uint16).view(np.float16).astype(np.float64)


def lloyd_max(mass: NDArray[np.floating] | NDArray[np.integer], levels: int) -> NDArray[np.float16]:
    """(levels,) magnitudes, ascending, the last > 0, that locally minimise the squared error.

    mass: (32768,) weight of each float16 bit pattern.
    """
    points, weight = _points(), mass[:FINITE].astype(np.float64)
    if not weight.any():  # weights of a Fisher that is zero everywhere
        weight = np.ones(FINITE)
    total = np.concatenate(([0.0], np.cumsum(weight)))
    moment = np.concatenate(([0.0], np.cumsum(weight * points)))
    # Start where the density of good quantizers lies, the cube root of the data's (Panter and Dite, 1951).
    gap = np.diff(points, append=points[-1] + 32.0)
    spread = np.cumsum(np.cbrt(weight * gap * gap))
    centres = points[np.searchsorted(spread, (np.arange(levels) + 0.5) / levels * spread[-1])]
    edges = np.empty(0, np.int64)
    for _ in range(ROUNDS):
        before = edges
        edges = np.searchsorted(points, (centres[1:] + centres[:-1]) / 2, side="right")
        if np.array_equal(edges, before) and levels > 1:
            break
        bounds = np.concatenate(([0], edges, [FINITE]))
        inside = np.diff(total[bounds])
        means = np.diff(moment[bounds]) / np.where(inside > 0, inside, 1)
        centres = np.where(inside > 0, means, centres)
    table = np.maximum.accumulate(centres.astype(np.float16))
    table[-1] = max(table[-1], HALF_SMALLEST)
    return table


def nearest(table: NDArray[np.float16]) -> NDArray[np.uint8]:
    """(32768,) index of the table's magnitude nearest to each float16 bit pattern; ties go down."""
    wide = table.astype(np.float64)
    found = np.full(1 << 15, len(table) - 1, np.uint8)
    found[:FINITE] = np.searchsorted((wide[1:] + wide[:-1]) / 2, _points())
    return found
