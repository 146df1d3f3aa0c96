"""Writes the damaged messages of this folder: ``python tests/federated/attacks/make.py`` from the repository's root.

Built from docs/wire-format.md by tests/federated/reference.py, without the package, so that reader and writer cannot
agree on a mistake. ``CASES`` maps each file to the error it has to raise; None: it has to be read. Unless a case is
about the checksum, it is right: what is tested is what comes after it.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.federated import reference as ref

HERE = Path(__file__).parent
SHAPES = (("a", (5, 8)), ("b", (6, 4)), ("c", (8,)), ("d", (6,)))
BASE, ROUND = bytes(range(16)), 7
CODES, RICE, COUNTS, WIDTH = (5, 3, 10, 0), (2, 0, 31, 0), (6, 24, 5, 0), 5
USED = 1 << 3 | 1 << 5 | 1 << 10
GAPS = (0, 3, 9, 0, 5, 2)  # positions 0, 4, 14, 15, 21, 24 of 40
SYMBOLS, FREQUENCIES = (0, 1, 0, 0, 1, 0), (2731, 1365)
MARKS, INTS, INT_FREQUENCIES = (1, 0, 1, 1, 0, 1, 0, 1), (0, 2, 2, 1, 0), (1639, 819, 1638)
ONE, NAN, INFINITE = 0x3C00, 0x7E00, 0x7C00
Parts = dict[str, bytes]


def unary(gaps: tuple[int, ...] = GAPS, k: int = 2) -> str:
    """The unary stream as text."""
    return "".join("0" * (gap >> k) + "1" for gap in gaps)


def halves(*patterns: int) -> bytes:
    return struct.pack(f"<{len(patterns)}H", *patterns)


def words(marks: tuple[int, ...] = MARKS, symbols: tuple[int, ...] = SYMBOLS) -> list[int]:
    parts = [(marks, (4096 - 2560, 2560)), (symbols, FREQUENCIES), (INTS, INT_FREQUENCIES)]
    return ref.ans_write(parts)


def fixed(
    exponent: int = -10, widths: tuple[int, int, int] = (4, 5, 5), bits: int | None = None, count: int | None = None
) -> bytes:
    streams = len(unary()) if bits is None else bits, len(words()) if count is None else count
    return struct.pack("<hBBBII", exponent, *widths, *streams)


def parts() -> Parts:
    """The parts of a layer that is as it should be, in order."""
    return {
        "fixed": fixed(),
        "codes": ref.planes(CODES, 4),
        "rice": ref.planes(RICE, 5),
        "counts": ref.planes(COUNTS, WIDTH),
        "scales": halves(ONE, 0x3A00),
        "table": halves(0x3800, ONE),
        "frequencies": ref.planes(FREQUENCIES, 13),
        "int frequencies": ref.planes(INT_FREQUENCIES, 13),
        "unary": ref.bits(unary()),
        "remainders": ref.planes([gap & 3 for gap in GAPS], 2),
        "raw": halves(*(0x3F80 + number for number in range(24))),
        "signs": ref.planes((0, 1, 0, 1, 1, 0), 1),
        "ans": b"".join(struct.pack("<I", word) for word in words()),
    }


def layer(**changed: bytes) -> bytes:
    """Bytes of that layer, some parts replaced (``_`` in a name stands for a blank)."""
    return b"".join((parts() | {name.replace("_", " "): data for name, data in changed.items()}).values())


def coded(stream: list[int]) -> bytes:
    """That layer with other ANS words."""
    return layer(fixed=fixed(count=len(stream)), ans=struct.pack(f"<{len(stream)}I", *stream))


def message(body: bytes | None = None, codes: int = USED, **header: Any) -> bytes:
    settings = {"base": BASE, "round": ROUND} | header
    return ref.header(layer() if body is None else body, SHAPES, codes=codes, **settings)


def bare(rest: bytes, *columns: tuple[int, ...]) -> bytes:
    """A layer without streams: the columns, then ``rest``."""
    widths, blocks = ref.columns(*columns)
    return struct.pack("<h", 0) + widths + struct.pack("<II", 0, 0) + blocks + rest


def single(code: int, raw: bytes, count: int = 6) -> bytes:
    """A message with all of tensor d in one raw code."""
    return message(bare(raw, (0, 0, 0, code), (0,) * 4, (0, 0, 0, count)), codes=1 << code)


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 0x80 >> bit % 8]) + data[bit // 8 + 1 :]


def last(name: str) -> dict[str, bytes]:
    """The part ``name`` with its last bit set: padding in the layer above."""
    data = parts()[name]
    return {name: flipped(data, 8 * len(data) - 1)}


_SECOND = bare(struct.pack("<3f", 1.5, -2.5, 0.0), (0, 0, 1, 0), (0,) * 4, (0, 0, 3, 0))
_HUGE = 0xFFFFFFFF
CASES: dict[str, tuple[str | None, Callable[[], bytes]]] = {
    "whole": (None, message),
    "empty": (None, lambda: message(b"", 0, layers=0)),
    "two-layers": (None, lambda: message(layer() + _SECOND, USED | 2, layers=2)),
    "largest-scale": (
        None,
        lambda: message(layer(fixed=fixed(exponent=96), scales=halves(0x7BFF, ONE), table=halves(ONE, 0x7BFF))),
    ),
    "feature-to-ignore": (None, lambda: message(features=0x8100)),
    # steps 1 and 2
    "no-bytes": ("Truncated", lambda: b""),
    "half-a-header": ("Truncated", lambda: message()[:40]),
    "not-a-message": ("Format", lambda: message(magic=b"PK\3\4")),
    "version-0": ("Version", lambda: message(version=0)),
    "version-2": ("Version", lambda: message(version=2)),
    "feature-to-understand": ("Version", lambda: message(features=0x0001)),
    "length-huge": ("Size", lambda: message(length=_HUGE)),
    "length-tiny": ("Size", lambda: message(length=8)),
    "cut-off": ("Truncated", lambda: message()[:-1]),
    "bytes-behind": ("Trailing", lambda: message() + b"\0"),
    # steps 3 to 5
    "wrong-crc": ("Checksum", lambda: message(crc=0)),
    "bit-flipped": ("Checksum", lambda: flipped(message(), 8 * 100)),
    "other-model": ("Model", lambda: message(base=bytes(16))),
    "other-tensors": ("Manifest", lambda: message(manifest=bytes(16))),
    "stale-round": ("Round", lambda: message(round=ROUND - 1)),
    "layers-5": ("Size", lambda: message(layer() * 5, layers=5)),
    "layers-255": ("Size", lambda: message(layers=255)),
    "code-unknown-in-header": ("Codec", lambda: message(codes=USED | 1 << 13)),
    # step 6
    "exponent-high": ("Scale", lambda: message(layer(fixed=fixed(exponent=97)))),
    "exponent-low": ("Scale", lambda: message(layer(fixed=fixed(exponent=-101)))),
    "codes-wide": ("Codec", lambda: message(layer(fixed=fixed(widths=(5, 5, 5))))),
    "codes-wider-than-needed": (
        "Codec",
        lambda: message(layer(fixed=fixed(widths=(4, 5, 5)), codes=ref.planes((5, 3, 7, 0), 4))),
    ),
    "rice-wide": ("Support", lambda: message(layer(fixed=fixed(widths=(4, 255, 5))))),
    "counts-wide": ("Count", lambda: message(layer(fixed=fixed(widths=(4, 5, 32))))),
    "counts-wider-than-needed": (
        "Count",
        lambda: message(layer(fixed=fixed(widths=(4, 5, 6)), counts=ref.planes(COUNTS, 6))),
    ),
    "code-unknown": ("Codec", lambda: message(layer(codes=ref.planes((15, 3, 10, 0), 4)))),
    "count-above-size": ("Count", lambda: message(layer(counts=ref.planes((6, 24, 9, 0), WIDTH)))),
    "count-huge": ("Count", lambda: message(layer(counts=b"\xf0" * WIDTH))),
    "count-without-code": ("Count", lambda: message(layer(counts=ref.planes((6, 24, 5, 1), WIDTH)))),
    "code-without-count": ("Count", lambda: message(layer(codes=ref.planes((5, 3, 10, 1), 4)))),
    "layer-of-nothing": ("Count", lambda: message(bare(b"", *[(0,) * 4] * 3), codes=0)),
    "coordinate-twice": ("Count", lambda: message(layer() + _SECOND * 2, USED | 2, layers=3)),
    "rice-25": ("Support", lambda: message(layer(rice=ref.planes((25, 0, 31, 0), 5)))),
    "rice-of-a-whole-tensor": ("Support", lambda: message(layer(rice=ref.planes((2, 1, 31, 0), 5)))),
    "rice-of-no-tensor": ("Support", lambda: message(layer(rice=ref.planes((2, 0, 31, 31), 5)))),
    "scale-nan": ("Scale", lambda: message(layer(scales=halves(NAN, ONE)))),
    "scale-infinite": ("Scale", lambda: message(layer(scales=halves(ONE, INFINITE)))),
    "scale-zero": ("Scale", lambda: message(layer(scales=halves(0, ONE)))),
    "scale-negative": ("Scale", lambda: message(layer(scales=halves(ONE, ONE | 0x8000)))),
    "table-nan": ("Table", lambda: message(layer(table=halves(ONE, NAN)))),
    "table-descending": ("Table", lambda: message(layer(table=halves(ONE, 0x3800)))),
    "table-zero": ("Table", lambda: message(layer(table=halves(0, 0)))),
    "table-negative-zero": ("Table", lambda: message(layer(table=halves(0x8000, ONE)))),
    "frequencies-sum": ("Table", lambda: message(layer(frequencies=ref.planes((2731, 1364), 13)))),
    "frequencies-huge": ("Table", lambda: message(layer(frequencies=ref.planes((8191, 8191), 13)))),
    "unary-huge": ("Size", lambda: message(layer(fixed=fixed(bits=_HUGE)))),
    "unary-longer": ("Support", lambda: message(layer(fixed=fixed(bits=len(unary()) + 1)))),
    "unary-too-few": ("Support", lambda: message(layer(unary=ref.bits(unary().replace("1", "0", 1))))),
    "unary-too-many": ("Support", lambda: message(layer(unary=ref.bits(unary().replace("0", "1", 1))))),
    "position-outside": (
        "Support",
        lambda: message(layer(fixed=fixed(bits=16), unary=ref.bits(unary((0, 40, 0, 0, 0, 0))))),
    ),
    "bitmap-too-many": ("Support", lambda: message(coded(words(marks=(1,) * 8)))),
    "value-nan": ("Value", lambda: single(1, struct.pack("<6f", 0, 0, 0, 0, 0, float("nan")))),
    "value-infinite-fp16": ("Value", lambda: single(2, halves(ONE, ONE, INFINITE, ONE, ONE, ONE))),
    "value-nan-bf16": ("Value", lambda: single(3, halves(0x7F80, 0, 0, 0, 0, 0))),
    "words-huge": ("Truncated", lambda: message(layer(fixed=fixed(count=_HUGE)))),
    "words-too-few": ("Truncated", lambda: message(layer(fixed=fixed(count=len(words()) + 1)))),
    "words-end-with-zero": ("Entropy", lambda: message(layer(fixed=fixed(count=len(words()) + 1)) + bytes(4))),
    "words-too-many": ("Entropy", lambda: message(layer(fixed=fixed(count=len(words()) + 1)) + b"\1\0\0\0")),
    "word-changed": ("Entropy", lambda: message(flipped(layer(), 8 * len(layer()) - 30))),
    **{
        f"padding-{name.replace(' ', '-')}": ("Padding", lambda name=name: message(layer(**last(name))))  # type: ignore[misc]
        for name in ("codes", "rice", "counts", "frequencies", "int frequencies", "unary", "remainders", "signs")
    },
    # step 7
    "code-not-announced": ("Codec", lambda: message(codes=USED & ~(1 << 3))),
    "code-announced-only": ("Codec", lambda: message(codes=USED | 1)),
    "code-announced-unused": ("Codec", lambda: message(codes=USED | 1 << 4)),
    "body-longer": ("Trailing", lambda: message(layer() + b"\0")),
    "layer-missing": ("Truncated", lambda: message(layers=2)),
}


def main() -> None:
    """Write every case anew."""
    for path in HERE.glob("*.fstm"):
        path.unlink()
    for case, (_, build) in CASES.items():
        (HERE / f"{case}.fstm").write_bytes(build())


if __name__ == "__main__":
    main()
