"""The manifest of a message: the ordered list of tensors that both sides know. Knows names and shapes, no values."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import DeltaError, OptionError

MAX_TENSORS, MAX_PARAMETERS, MAX_NAME, MAX_DIMENSIONS = 1 << 16, (1 << 31) - 1, 1024, 8
HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class TensorManifest:
    """Names and shapes of a delta's tensors, in the order in which messages hold them.

    Raises OptionError for names that repeat and for anything above the caps of docs/wire-format.md.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.tensors) <= MAX_TENSORS:
            raise OptionError(f"a manifest has 1 to {MAX_TENSORS} tensors, found {len(self.tensors)}")
        names = [name for name, _ in self.tensors]
        if len(set(names)) != len(names):
            raise OptionError("two tensors of the manifest have the same name; give each its own")
        for name, shape in self.tensors:
            if not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME:
                raise OptionError(f"a tensor's name has 1 to {MAX_NAME} bytes, found {name[:40]!a}")
            if not 0 < len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
                raise OptionError(f"{name!a} has shape {shape}, expected 1 to {MAX_DIMENSIONS} dimensions, none 0")
        if self.parameters > MAX_PARAMETERS:
            raise OptionError(f"the tensors have {self.parameters} parameters, expected at most {MAX_PARAMETERS}")

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> TensorManifest:
        """That of named arrays, in their order."""
        return cls(tuple((name, tuple(int(side) for side in array.shape)) for name, array in arrays.items()))

    @property
    def parameters(self) -> int:
        """Number of coordinates N."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(T,) coordinates of each tensor."""
        return np.array([math.prod(shape) for _, shape in self.tensors], np.int64)

    @property
    def digest(self) -> bytes:
        """The 16 bytes that stand for this manifest in a header."""
        hashed = hashlib.sha256(b"fstq-tensors-1\n")
        for name, shape in self.tensors:
            text = name.encode("utf-8", "surrogatepass")
            hashed.update(struct.pack(f"<H{len(text)}sB{len(shape)}I", len(text), text, len(shape), *shape))
        return hashed.digest()[:HASH_BYTES]

    def flatten(self, arrays: Mapping[str, Any], what: str = "delta") -> NDArray[np.float32]:
        """(N,) float32 copy of the arrays. Raises DeltaError for a missing, additional, misshapen or non-finite one."""
        if unknown := set(arrays) - {name for name, _ in self.tensors}:
            raise DeltaError(f"the {what} holds {min(unknown)!a}, which is not in the manifest. Leave it out.")
        flat = np.empty(self.parameters, np.float32)
        at = 0
        for name, shape in self.tensors:
            if name not in arrays:
                raise DeltaError(f"the {what} lacks {name!a}, which the manifest lists. Pass every tensor.")
            array = np.asarray(arrays[name])
            if array.shape != shape or array.dtype.kind != "f":
                raise DeltaError(
                    f"{name!a} of the {what} is {array.dtype} {array.shape}, expected floating point {shape}. "
                    f"Convert it, or make the manifest anew."
                )
            into = flat[at : at + array.size]
            with np.errstate(over="ignore", invalid="ignore"):
                into[:] = array.reshape(-1)  # a float64 above float32's range becomes infinite
                total = np.add.reduce(into)  # not finite if an item is not; the reverse is looked into below
            if not np.isfinite(total) and not np.isfinite(into).all():
                raise DeltaError(f"{name!a} of the {what} holds NaN or infinity. Skip this round's step.")
            at += array.size
        return flat

    def unflatten(self, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Views of (N,) values by name, each in its shape."""
        ends = np.cumsum(self.sizes)[:-1]
        parts = np.split(flat, ends)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.tensors, parts, strict=True)}
