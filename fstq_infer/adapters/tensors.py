"""The safetensors format, read strictly and written deterministically. Knows NumPy, nothing of what tensors mean.

https://github.com/huggingface/safetensors#format. Everything is checked against the file's size before memory is asked
for; tensors are views of the mapped file until they are copied.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import AdapterFormatError

FILE_CAP, HEADER_CAP, MOST_TENSORS, MOST_SIZE, MOST_DIMS = 4 << 30, 8 << 20, 1 << 16, 1 << 32, 4
BYTES = {"F16": 2, "BF16": 2, "F32": 4}
KINDS: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
OTHERS = frozenset(["BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F64", "F8_E4M3", "F8_E5M2"])
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """dtype: as the format names it. data: its bytes, not copied."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> Array:
        """A copy, float16 as it is, bfloat16 as float32."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, np.dtype("<u2")).astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, KINDS[self.dtype]).reshape(self.shape).copy()


def regular_size(path: Path, cap: int) -> int:
    """Bytes of a regular file of at most ``cap``. Raises AdapterFormatError."""
    try:
        status = os.stat(path, follow_symlinks=True)
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} cannot be read: {error}. Check the adapter's folder.") from error
    if not stat.S_ISREG(status.st_mode):
        raise AdapterFormatError(f"{path} is no regular file, expected one. Check the adapter's folder.")
    if status.st_size > cap:
        raise AdapterFormatError(f"{path} has {status.st_size} bytes, expected at most {cap}. Is it an adapter's?")
    return status.st_size


def read(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """All tensors of a file by name. sha256: that the file has to have.

    Raises AdapterFormatError, whatever the file holds.
    """
    size = regular_size(path, FILE_CAP)
    try:
        with open(path, "rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(HEADER_CAP, size - 8):
                raise _bad(path, f"a header of {length} bytes, expected 2 to {max(0, min(HEADER_CAP, size - 8))}")
            header = file.read(length)
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read: {error}. Check permissions and the disk.") from error
    if len(whole) != size or len(header) != length:
        raise _bad(path, "another size than a moment ago")
    if sha256 is not None and hashlib.sha256(whole).hexdigest() != sha256:
        raise AdapterFormatError(f"{path} has changed since it was added. Add the adapter again (--force).")
    return _tensors(path, _header(path, header), whole[8 + length :])


def _bad(path: Path, found: str) -> AdapterFormatError:
    return AdapterFormatError(f"{path} is no safetensors file: found {found}. Fetch or save the adapter again.")


def _header(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def small(text: str) -> int:
        if len(text) > 20:  # int() takes quadratic time
            raise ValueError(f"an integer of {len(text)} digits")
        return int(text)

    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_int=small)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"a header that is no JSON ({error!s:.100})") from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise _bad(path, f"a header that is no object of at most {MOST_TENSORS} tensors")
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(text, str) for text in meta.values()):
        raise _bad(path, "metadata that is no object of texts")
    return header


def _tensors(path: Path, header: Mapping[str, Any], data: memoryview) -> dict[str, Tensor]:
    found, spans = {}, []
    for name, entry in header.items():
        shown = f"{name:.80}".encode("unicode_escape").decode()
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _bad(path, f"tensor {shown!r} without dtype, shape and data_offsets alone")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BYTES:
            if isinstance(dtype, str) and dtype in OTHERS:
                raise AdapterFormatError(
                    f"{path}: tensor {shown!r} is {dtype}; expected F32, F16 or BF16. Save the adapter in one of these."
                )
            raise _bad(path, f"tensor {shown!r} of an unknown type")
        if not _naturals(shape, MOST_DIMS) or not _naturals(span, 2) or len(span) != 2:
            raise _bad(path, f"tensor {shown!r} whose shape or offsets are no lists of natural numbers")
        count = 1
        for extent in shape:
            count *= extent  # at most four factors of 32 bits
        if span[0] > span[1] or span[1] > len(data) or span[1] - span[0] != count * BYTES[dtype]:
            raise _bad(path, f"tensor {shown!r} whose bytes {span} do not fit its shape {shape} or the file")
        spans.append((span[0], span[1]))
        found[name] = Tensor(dtype, tuple(shape), data[span[0] : span[1]])
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _bad(path, "tensors with a gap between them, or that overlap")
        end = stop
    if end != len(data):
        raise _bad(path, f"{len(data) - end} bytes that belong to no tensor")
    return found


def _naturals(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MOST_SIZE for n in value)
    )


def encode(arrays: Mapping[str, Array]) -> bytes:
    """A file of float32 and float16 tensors, sorted by name: the same bytes for equal tensors."""
    header, parts, at = {}, [], 0
    for name, array in sorted(arrays.items()):
        kind = next(kind for kind, dtype in KINDS.items() if dtype == array.dtype)
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
