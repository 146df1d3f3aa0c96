"""A second implementation of docs/wire-format.md, in plain Python and from that page only: slow, small and obvious.

Tests compare the package with it, so that writer and reader of the package cannot agree on a mistake.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

Shapes = Sequence[tuple[str, tuple[int, ...]]]
RAW = {1: "<f", 2: "<e", 3: "<H"}
MAGNITUDES = {4: 1, 5: 2, 6: 4, 7: 8, 8: 128}
HALVES = {10: 1, 11: 7, 12: 127}
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def single(value: float) -> float:
    """Rounded to binary32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def half(pattern: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", pattern))[0])


def alphabet(code: int) -> int:
    return MAGNITUDES.get(code) or (16 if code == 9 else 2 * HALVES[code] + 1 if code in HALVES else 0)


def manifest_hash(shapes: Shapes) -> bytes:
    data = b"fstq-tensors-1\n"
    for name, shape in shapes:
        text = name.encode()
        data += struct.pack("<H", len(text)) + text + bytes([len(shape)]) + struct.pack(f"<{len(shape)}I", *shape)
    return hashlib.sha256(data).digest()[:16]


# ---- writing -----------------------------------------------------------------------------------------------------


def planes(numbers: Iterable[int], width: int) -> bytes:
    numbers, out = list(numbers), b""
    for bit in reversed(range(width)):
        text = "".join(str(number >> bit & 1) for number in numbers)
        out += bits(text)
    return out


def columns(*numbers: Sequence[int]) -> tuple[bytes, bytes]:
    """(widths, plane blocks) of a layer's columns."""
    widths = [max(column).bit_length() for column in numbers]
    return bytes(widths), b"".join(planes(column, width) for column, width in zip(numbers, widths, strict=True))


def bits(text: str) -> bytes:
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def cumulative(frequencies: Sequence[int], digits: int) -> list[int]:
    """left(0) .. left(n) of a group of digits."""
    weights = [1 << 20]
    for _ in range(digits):
        weights = [weight * frequency >> 12 for weight in weights for frequency in frequencies]
    weights = [max(weight, 1) for weight in weights]
    weights[weights.index(max(weights))] += (1 << 20) - sum(weights)
    n, before, left = len(weights), 0, []
    for symbol, weight in enumerate(weights):
        left.append((before * ((1 << 24) - n) >> 20) + symbol)
        before += weight
    return [*left, 1 << 24]


def grouping(size: int) -> int:
    return max(g for g in range(1, 9) if size**g <= 256)


def ans_write(parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Words of (digits, frequencies) in the order of decoding."""
    symbols: list[tuple[int, list[int]]] = []
    for digits, frequencies in parts:
        g = grouping(len(frequencies))
        whole = len(digits) // g * g
        joint, alone = cumulative(frequencies, g), cumulative(frequencies, 1)
        for at in range(0, whole, g):
            symbol = 0
            for digit in digits[at : at + g]:
                symbol = symbol * len(frequencies) + digit
            symbols.append((symbol, joint))
        symbols += [(digit, alone) for digit in digits[whole:]]
    state, words = 0, []
    for symbol, left in reversed(symbols):
        p = left[symbol + 1] - left[symbol]
        if state >> 40 >= p:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // p << 24) + state % p + left[symbol]
    while state:
        words.append(state & 0xFFFFFFFF)
        state >>= 32
    return words


def header(
    body: bytes, shapes: Shapes, base: bytes, codes: int, layers: int = 1, round: int = 7, **other: Any
) -> bytes:
    """The message around a body; ``other``: magic, version, features, length, crc, manifest."""
    length = other.get("length", 56 + len(body))
    front = other.get("magic", b"FSTM") + struct.pack(
        "<BBHI", other.get("version", 1), layers, other.get("features", 0), length
    )
    back = struct.pack("<II", round, codes) + base + other.get("manifest", manifest_hash(shapes)) + body
    return front + struct.pack("<I", other.get("crc", zlib.crc32(front + back))) + back


# ---- reading a message that is known to be good ------------------------------------------------------------------


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        self.at += size
        assert self.at <= len(self.data)
        return self.data[self.at - size : self.at]

    def numbers(self, form: str, count: int) -> list[Any]:
        return [struct.unpack(form, self.take(struct.calcsize(form)))[0] for _ in range(count)]

    def text(self, count: int) -> str:
        return "".join(f"{byte:08b}" for byte in self.take((count + 7) // 8))[:count]

    def planes(self, count: int, width: int) -> list[int]:
        numbers = [0] * count
        for _ in range(width):
            numbers = [number * 2 + int(bit) for number, bit in zip(numbers, self.text(count), strict=True)]
        return numbers


class Ans:
    def __init__(self, words: list[int]) -> None:
        self.words, self.state = list(words), 0
        for _ in range(2):
            if self.words:
                self.state = self.state << 32 | self.words.pop()

    def symbol(self, left: list[int]) -> int:
        low = self.state & 0xFFFFFF
        found = next(s for s in range(len(left) - 1) if left[s] <= low < left[s + 1])
        self.state = (left[found + 1] - left[found]) * (self.state >> 24) + low - left[found]
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return found

    def digits(self, count: int, frequencies: Sequence[int]) -> list[int]:
        size = len(frequencies)
        g = grouping(size)
        joint, alone, out = cumulative(frequencies, g), cumulative(frequencies, 1), list[int]()
        for _ in range(count // g):
            symbol = self.symbol(joint)
            out += [symbol // size**place % size for place in reversed(range(g))]
        return out + [self.symbol(alone) for _ in range(count % g)]


def read(blob: bytes, shapes: Shapes) -> list[float]:
    """All coordinates of the delta."""
    sizes = [math.prod(shape) for _, shape in shapes]
    reader = Reader(blob)
    front = reader.take(56)
    assert front[:4] == b"FSTM" and front[40:] == manifest_hash(shapes)
    free = [list(range(size)) for size in sizes]
    values = [[0.0] * size for size in sizes]
    for _ in range(front[5]):
        for t, found in enumerate(layer(reader, [len(left) for left in free])):
            for position, value in found:
                values[t][free[t][position]] = value
            taken = {position for position, _ in found}
            free[t] = [index for position, index in enumerate(free[t]) if position not in taken]
    assert reader.at == len(blob)
    return [value for tensor in values for value in tensor]


def layer(reader: Reader, sizes: list[int]) -> list[list[tuple[int, float]]]:
    """(position, value) pairs of each tensor."""
    tensors = range(len(sizes))
    exponent, *widths, unary_bits, word_count = struct.unpack("<hBBBII", reader.take(13))
    codes, rice, counts = (reader.planes(len(sizes), width) for width in widths)
    scales = {t: reader.numbers("<e", 1)[0] * 2.0**exponent for t in tensors if codes[t] >= 4}
    used = sorted(set(codes) - {0})
    tables, frequencies = {}, {}
    for code in used:
        if code in MAGNITUDES:
            tables[code] = reader.numbers("<e", MAGNITUDES[code])
        if alphabet(code) > 1:
            frequencies[code] = reader.planes(alphabet(code), 13)
    unary = reader.text(unary_bits)
    order = sorted((t for t in tensors if 0 < counts[t] < sizes[t] and rice[t] != 31), key=lambda t: rice[t])
    low = {k: reader.planes(sum(counts[t] for t in order if rice[t] == k), k) for k in sorted({rice[t] for t in order})}
    signs, raw = {}, {}
    for code in used:
        count = sum(counts[t] for t in tensors if codes[t] == code)
        if code in MAGNITUDES:
            signs[code] = reader.planes(count, 1)
        if code in RAW:
            raw[code] = reader.numbers(RAW[code], count)
    ans = Ans(reader.numbers("<I", word_count))

    quotients = [len(zeros) for zeros in unary.split("1")]
    positions = {}
    for t in order:
        at, positions[t] = -1, []
        for _ in range(counts[t]):
            at += (quotients.pop(0) << rice[t]) + low[rice[t]].pop(0) + 1
            positions[t].append(at)
    assert quotients in ([], [0])
    for t in tensors:
        if rice[t] == 31:
            ones = min(max((2 * 4096 * counts[t] + sizes[t]) // (2 * sizes[t]), 1), 4095)
            marks = ans.digits(sizes[t], [4096 - ones, ones])
            positions[t] = [position for position, mark in enumerate(marks) if mark]
        elif t not in positions:
            positions[t] = list(range(counts[t]))
    symbols = {code: ans.digits(sum(counts[t] for t in tensors if codes[t] == code), frequencies[code])
               for code in used if alphabet(code) > 1}  # fmt: skip
    assert ans.state == 0 and not ans.words

    def value(t: int) -> float:
        code = codes[t]
        if code in RAW:
            found = raw[code].pop(0)
            return float(struct.unpack("<f", struct.pack("<I", found << 16))[0]) if code == 3 else float(found)
        symbol = symbols[code].pop(0) if code in symbols else 0
        if code in MAGNITUDES:
            entry = -tables[code][symbol] if signs[code].pop(0) else tables[code][symbol]
        else:
            entry = NF4[symbol] if code == 9 else (symbol - HALVES[code]) / HALVES[code]
        return single(single(entry) * scales[t])

    return [[(position, value(t)) for position in positions[t]] for t in tensors]
