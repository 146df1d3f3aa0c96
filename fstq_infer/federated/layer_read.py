"""One layer of a message read from its bytes: step 6 of the checks in docs/wire-format.md, in that order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import (
    MessageCodecError,
    MessageCountError,
    MessageError,
    MessageScaleError,
    MessageSizeError,
    MessageSupportError,
    MessageTableError,
    MessageValueError,
)
from fstq_infer.federated import ans, rice
from fstq_infer.federated.bits import Cursor, check_padding
from fstq_infer.federated.codes import BY_ID, Block, Code
from fstq_infer.federated.header import AGAIN
from fstq_infer.federated.layer import (
    BITMAP,
    CODE_BITS,
    COUNT_BITS,
    FIXED,
    FREQUENCY_BITS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    RICE_BITS,
    Ints,
    Layer,
    riced,
    scaled,
    starts_of,
)


def read(cursor: Cursor, sizes: Ints) -> Layer:
    """The next layer. sizes: (T,) coordinates that earlier layers left.

    Raises the subclasses of MessageError that step 6 names.
    """
    tensors = len(sizes)
    exponent, code_bits, rice_bits, count_bits, length, word_count = FIXED.unpack(
        cursor.take(FIXED.size, "layer header").tobytes()
    )
    if not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
        raise MessageScaleError(f"the exponent is {exponent}, expected {MIN_EXPONENT} to {MAX_EXPONENT}. {AGAIN}")
    codes = _column(cursor, tensors, code_bits, CODE_BITS, "codes", MessageCodecError)
    rice_k = _column(cursor, tensors, rice_bits, RICE_BITS, "Rice parameters", MessageSupportError)
    counts = _column(cursor, tensors, count_bits, COUNT_BITS, "counts", MessageCountError).astype(np.int64)
    if unknown := set(np.unique(codes).tolist()) - {0, *BY_ID}:
        raise MessageCodecError(f"a tensor has code {min(unknown)}, known are 0 to {max(BY_ID)}. Update this side.")
    _check_counts(codes, counts, sizes)
    _check_rice(rice_k, counts, sizes)
    has_scale = scaled(codes)
    scales = np.zeros(tensors, np.float16)
    scales[has_scale] = cursor.array(int(has_scale.sum()), "f2", "scales")
    if not (np.isfinite(scales).all() and (scales[has_scale] > 0).all()):
        raise MessageScaleError(f"a scale is not finite or not above 0. {AGAIN}")
    used = [BY_ID[id] for id in np.unique(codes).tolist() if id]
    tables = {code.id: _read_table(cursor, code) for code in used}

    order = riced(rice_k, counts, sizes)
    limit = int((counts[order] + (sizes[order] >> rice_k[order])).sum())
    if length > limit:
        raise MessageSizeError(f"the unary stream has {length} bits, expected at most {limit}. {AGAIN}")
    unary = cursor.take((length + 7) // 8, "unary stream")
    check_padding(unary, length, "unary stream")
    remainders: dict[int, NDArray[Any]] = {}
    for k in np.unique(rice_k[order]).tolist():
        if k:
            remainders[k] = cursor.planes(int(counts[order][rice_k[order] == k].sum()), k, "remainders")
    raw: dict[int, NDArray[Any]] = {}
    signs: dict[int, NDArray[np.uint8]] = {}
    for code in used:
        items = int(counts[codes == code.id].sum())
        if code.signed:
            signs[code.id] = cursor.planes(items, 1, "signs")
        if code.raw:
            raw[code.id] = _read_raw(cursor, code, items)

    decoder = ans.Decoder(cursor.array(word_count, "u4", "entropy-coded words"))
    bitmaps = {
        t: decoder.pop(int(sizes[t]), ans.share(int(counts[t]), int(sizes[t])))
        for t in np.flatnonzero(rice_k == BITMAP).tolist()
    }
    blocks: dict[int, Block] = {}
    for code in used:
        table, frequency = tables[code.id]
        symbols = None
        if code.symbols > 1:
            symbols = decoder.pop(int(counts[codes == code.id].sum()), frequency)
        blocks[code.id] = Block.of(table, frequency, symbols, signs.get(code.id), raw.get(code.id))
    decoder.finish()
    ends = rice.ends(unary, length, int(counts[order].sum()))
    ordered = rice.positions(ends, remainders, rice_k[order], counts[order], sizes[order])
    positions = _gather(ordered, order, bitmaps, counts, sizes)
    return Layer(codes, rice_k, counts, exponent, scales, positions, blocks)


def _column(cursor: Cursor, tensors: int, width: int, most: int, what: str, error: type[MessageError]) -> NDArray[Any]:
    """(T,) numbers, no wider than they need to be."""
    if width > most:
        raise error(f"the {what} have {width} bits, expected at most {most}. {AGAIN}")
    column = cursor.planes(tensors, width, what)
    if (needed := int(column.max()).bit_length()) != width:
        raise error(f"the {what} have {width} bits, expected the {needed} of the largest. {AGAIN}")
    return column


def _check_counts(codes: NDArray[np.uint8], counts: Ints, sizes: Ints) -> None:
    if np.any(counts > sizes):
        t = int(np.argmax(counts - sizes))
        raise MessageCountError(f"tensor {t} has {counts[t]} coordinates, expected at most {sizes[t]}. {AGAIN}")
    if np.any((counts == 0) != (codes == 0)):
        t = int(np.argmax((counts == 0) != (codes == 0)))
        raise MessageCountError(f"tensor {t} has {counts[t]} coordinates and code {codes[t]}: one is 0. {AGAIN}")
    if not counts.any():
        raise MessageCountError(f"a layer codes no coordinate, expected at least one. {AGAIN}")


def _check_rice(rice_k: NDArray[np.uint8], counts: Ints, sizes: Ints) -> None:
    whole = (counts == 0) | (counts == sizes)
    bad = np.where(whole, rice_k != 0, (rice_k > rice.MAX_K) & (rice_k != BITMAP))
    if bad.any():
        t = int(np.argmax(bad))
        wanted = "0" if whole[t] else f"0 to {rice.MAX_K} or {BITMAP}"
        raise MessageSupportError(f"tensor {t} has Rice parameter {rice_k[t]}, expected {wanted}. {AGAIN}")


def _read_table(cursor: Cursor, code: Code) -> tuple[NDArray[np.float16], Ints]:
    """(magnitudes, frequencies) of a code, empty where it has none."""
    table, frequency = np.empty(0, np.float16), np.empty(0, np.int64)
    if code.learned:
        table = cursor.array(code.symbols, "f2", f"table of {code.name}")
        ordered = np.isfinite(table).all() and not np.signbit(table).any() and (table[1:] >= table[:-1]).all()
        if not ordered or table[-1] <= 0:
            raise MessageTableError(
                f"the table of {code.name} holds {table[:8].tolist()}.., expected finite magnitudes, ascending. {AGAIN}"
            )
    if code.symbols > 1:
        frequency = cursor.planes(code.symbols, FREQUENCY_BITS, f"frequencies of {code.name}").astype(np.int64)
        if frequency.sum() != ans.TOTAL:
            raise MessageTableError(
                f"the frequencies of {code.name} sum to {frequency.sum()}, expected {ans.TOTAL}. {AGAIN}"
            )
    return table, frequency


def _read_raw(cursor: Cursor, code: Code, items: int) -> NDArray[Any]:
    raw = cursor.array(items, code.raw, f"{code.name} values")
    finite = np.isfinite(raw).all() if code.raw != "u2" else not ((raw & 0x7F80) == 0x7F80).any()
    if not finite:
        raise MessageValueError(f"a value of {code.name} is NaN or infinite, expected finite ones. {AGAIN}")
    return raw


def _gather(
    ordered: Ints, order: NDArray[np.intp], bitmaps: dict[int, NDArray[np.uint8]], counts: Ints, sizes: Ints
) -> Ints:
    """(n,) positions of all tensors in manifest order, from those in stream order, bitmaps and whole tensors."""
    sent = np.flatnonzero(counts)
    if np.array_equal(order, sent):
        return ordered
    found: dict[int, Ints] = {}
    for t, start, count in zip(order.tolist(), starts_of(counts[order]).tolist(), counts[order].tolist(), strict=True):
        found[t] = ordered[start : start + count]
    for t, bitmap in bitmaps.items():
        found[t] = np.flatnonzero(bitmap)
        if len(found[t]) != counts[t]:
            raise MessageSupportError(
                f"the bitmap of tensor {t} has {len(found[t])} ones, expected {counts[t]}. {AGAIN}"
            )
    return np.concatenate([found[t] if t in found else np.arange(counts[t]) for t in sent.tolist()])
