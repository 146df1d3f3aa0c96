"""What one client remembers between rounds, on disk: residual, velocity, Fisher and its last message.

Values are fp16 under one power of two each, which keeps 11 bits of every value down to 2^-29 of the largest. Two
generations are kept, so that a server which goes back one round finds the client as it was before that round.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import StateError
from fstq_infer.federated import saved
from fstq_infer.federated.feedback import Floats, State
from fstq_infer.federated.tensors import TensorManifest

log = logging.getLogger(__name__)
VERSION, LARGEST = 1, 15  # LARGEST: values are scaled to at most 2^15, below the largest fp16 number


@dataclass(frozen=True, slots=True)
class Memory:
    """State of the feedback, (N,) Fisher, and the last message with its round; all empty for a client that is new."""

    state: State = field(default_factory=State)
    fisher: Floats | None = None
    round: int = -1
    message: bytes = b""


@dataclass(frozen=True, slots=True)
class MemoryFolder:
    """Memories of any number of clients. Files are named after client and manifest; run and base model are inside."""

    path: Path

    def load(self, client: str, manifest: TensorManifest, base: bytes, run: str, before: int) -> Memory:
        """The newest memory from an earlier round than ``before`` of this run; an empty one where there is none.

        A damaged file, or one of another base model or run, is reported and not used; :meth:`save` replaces it.
        """
        found = [self._read(path, client, manifest, base, run) for path in self._paths(client, manifest)]
        usable = [memory for memory in found if memory is not None and memory.round < before]
        return max(usable, key=lambda memory: memory.round, default=Memory())

    def save(self, client: str, manifest: TensorManifest, base: bytes, run: str, memory: Memory) -> None:
        """Write the memory of a round in place of the older generation. Raises StateError when it cannot be written."""
        first, second = self._paths(client, manifest)
        arrays: dict[str, NDArray[Any]] = {"message": np.frombuffer(memory.message, np.uint8)}
        exponents = dict[str, int]()
        for name, values in _parts(memory).items():
            arrays[name], exponents[name] = _to_half(values)
        facts = {
            "version": VERSION,
            "client": client,
            "manifest": manifest.digest.hex(),
            "base": base.hex(),
            "run": run,
            "round": memory.round,
            "exponents": exponents,
        }
        saved.save(saved.older(first, second, memory.round), arrays, facts)

    def _paths(self, client: str, manifest: TensorManifest) -> tuple[Path, Path]:
        name = f"{hashlib.sha256(client.encode()).hexdigest()[:24]}-{manifest.digest.hex()}"
        return self.path / f"{name}-a.safetensors", self.path / f"{name}-b.safetensors"

    def _read(self, path: Path, client: str, manifest: TensorManifest, base: bytes, run: str) -> Memory | None:
        try:
            arrays, facts = saved.load(path)
            expected = {"version": VERSION, "client": client, "manifest": manifest.digest.hex()}
            expected |= {"base": base.hex(), "run": run}
            for key, value in expected.items():
                if facts.get(key) != value:
                    log.info("%s has %s %r, this is %r: not used", path, key, facts.get(key), value)
                    return None
            parts = dict[str, Floats | None]()
            for name in ("residual", "velocity", "fisher"):
                half = arrays.get(name)
                if half is not None and (half.shape != (manifest.parameters,) or half.dtype != np.float16):
                    raise StateError(f"{path} is damaged: '{name}' is {half.dtype} {half.shape}.")
                parts[name] = None if half is None else _to_single(half, int(facts["exponents"][name]))
            state = State(parts["residual"], parts["velocity"])
            return Memory(state, parts["fisher"], int(facts["round"]), arrays["message"].tobytes())
        except FileNotFoundError:
            return None
        except (StateError, KeyError, TypeError, ValueError) as error:
            log.warning("memory of client %r is lost, it begins anew: %s", client, error)
            return None


def _parts(memory: Memory) -> dict[str, Floats]:
    parts = {"residual": memory.state.residual, "velocity": memory.state.velocity, "fisher": memory.fisher}
    return {name: values for name, values in parts.items() if values is not None}


def _to_half(values: Floats) -> tuple[NDArray[np.float16], int]:
    """(fp16 numbers, exponent): values are about numbers x 2^exponent."""
    largest = float(np.abs(values).max(initial=0))
    exponent = int(np.frexp(largest)[1]) - LARGEST if largest else 0
    return np.ldexp(values, -exponent).astype(np.float16), exponent


def _to_single(half: NDArray[np.float16], exponent: int) -> Floats:
    return np.ldexp(half.astype(np.float32), exponent)
