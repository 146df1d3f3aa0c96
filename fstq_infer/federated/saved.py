"""Arrays and a few texts in one file that is whole or absent (safetensors with a checksum). Never pickle."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.atomic import replace_file
from fstq_infer.errors import MissingExtraError, StateError

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save as _serialize
except ModuleNotFoundError as error:
    raise MissingExtraError("saving federated state", error.name or "safetensors", "federated") from error

Arrays = Mapping[str, NDArray[Any]]
AGAIN = "Restore it from a copy, or remove it to begin anew."


def save(path: Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Replace ``path``. facts: what JSON can hold. Raises StateError when it cannot be written."""
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(facts, sort_keys=True)
    metadata = {"fstq": f"{_crc(held, text):08x} {text}"}  # one entry: safetensors orders several at random
    try:
        replace_file(path, _serialize(held, metadata))
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error}. Check permissions and free space.") from error


def load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """(arrays, facts) of a file that :func:`save` wrote. Raises StateError for another, FileNotFoundError for none."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        crc, _, text = metadata["fstq"].partition(" ")
        facts = json.loads(text)
        if not isinstance(facts, dict) or int(crc, 16) != _crc(arrays, text):
            raise StateError(f"{path} is damaged: its checksum does not match its content. {AGAIN}")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is damaged: {error}. {AGAIN}") from error
    return arrays, facts


def older(first: Path, second: Path, round: int) -> Path:
    """Which of two generations to write: one that is unreadable, of this round or of a later one, else the older."""
    rounds = [_round_of(path) for path in (first, second)]
    worth = [-1 if found is None or found >= round else found for found in rounds]
    return first if worth[0] <= worth[1] else second


def _round_of(path: Path) -> int | None:
    try:
        return int(load(path)[1]["round"])
    except (StateError, OSError, KeyError, TypeError, ValueError):
        return None


def _crc(arrays: Arrays, text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        crc = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc
