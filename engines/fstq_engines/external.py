"""Which files a graph reads its tensors from, seen in the protobuf wire format, before anything parses the graph.

A hostile model.onnx may name any file of the machine as external data. ONNX Runtime 1.32 refuses what leaves the
model's directory, 1.24 does not for sparse tensors, and 1.23, the last one for Python 3.10, refuses nothing; other
files of the directory, which no checksum covers, all of them accept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from fstq_infer.errors import BundlePathError, EngineError

# Message -> field number -> message type of that field: the ways from ModelProto to TensorProto (onnx.proto).
FIELDS = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
KEY, VALUE = 1, 2  # of an Entry: external_data is a list of keys and values
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check_external_data(model: Path, allowed: Collection[str]) -> None:
    """Raise BundlePathError when the graph in ``model`` reads tensors from a file that is not in ``allowed``.

    Raises EngineError for a file that is no protobuf message.
    """
    try:
        foreign = locations(model.read_bytes()) - {name.encode() for name in allowed}
    except ValueError as error:
        raise EngineError(f"{model} is no ONNX graph: {error}. Fetch an undamaged copy of the bundle.") from error
    if foreign:
        raise BundlePathError(
            f"{model} reads weights from {min(foreign)[:200]!a}, expected only {', '.join(allowed) or 'no file'}. "
            "Do not use this bundle: it was damaged, or made to read other files of this machine."
        )


def locations(data: bytes) -> set[bytes]:
    """All locations of external data in a serialized ModelProto. Raises ValueError for what is no such message."""
    found = set()
    todo = [("Model", memoryview(data))]  # no recursion: a hostile graph may be nested as deeply as it likes
    while todo:
        kind, message = todo.pop()
        for number, content in _fields(message):
            child = FIELDS[kind].get(number)
            if child == "Entry":
                entry = list(_fields(content))
                if any(field == KEY and bytes(part) == b"location" for field, part in entry):
                    found |= {bytes(part) for field, part in entry if field == VALUE} or {b""}
            elif child is not None:
                todo.append((child, content))
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field, the only kind that holds messages and strings."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(message, at)
        elif kind == BYTES:
            size, at = _varint(message, at)
            if size > end - at:
                raise ValueError(f"a field of {size} bytes where {end - at} are left")
            yield tag >> 3, message[at : at + size]
            at += size
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}, expected 0, 1, 2 or 5")
    if at > end:
        raise ValueError("the last field is cut off")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, place after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("the last field is cut off")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
