"""The adapters of a bundle: adding, removing and loading them. Each step leaves a whole bundle; engines stay valid.

An adapter's file holds its matrices as the graph takes them (docs/bundle-format.md), in the graph's type.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters import tensors
from fstq_infer.adapters.fit import fit
from fstq_infer.adapters.info import FOLDER, AdapterInfo, check_name, path_of
from fstq_infer.adapters.peft import WEIGHTS, Peft, read
from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.atomic import replace_file, sha256_file, staged_file
from fstq_infer.bundle import MANIFEST_CAP, Bundle
from fstq_infer.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNameError,
    BundleError,
    BundlePathError,
    suggestion,
)
from fstq_infer.manifest import Manifest, Pruning
from fstq_infer.strict_json import MANIFEST

try:
    import fcntl
except ImportError:  # no flock outside POSIX
    fcntl = None  # type: ignore[assignment]

Array = NDArray[Any]
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter. arrays: by name of the graph's input, (inputs, rank), (rank, outputs) or a probe's shape."""

    name: str
    arrays: Mapping[str, Array]
    probe: bool
    pruning: Pruning | None


def encode(
    adapter: Peft,
    ports: LoraPorts,
    dtype: str,
    base_sha256: str,
    probes: Mapping[str, Array] | None = None,
    pruning: Pruning | None = None,
) -> tuple[bytes, AdapterInfo]:
    """(content of the file, entry of the manifest) for what PEFT saved. Raises AdapterError subclasses.

    probes: weights in place of the bundle's probes, by input.
    """
    kind = DTYPES.get(dtype)
    if kind is None:
        raise AdapterMismatchError(f"adapters for graphs in {dtype} are not supported; expected {', '.join(DTYPES)}.")
    with np.errstate(over="ignore"):
        arrays: dict[str, Array] = {
            name: array.astype(kind) for name, array in fit(adapter, ports, base_sha256).items()
        }
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise AdapterMismatchError(f"{adapter.path} has weights that are too large for a graph in {dtype}.")
    data = tensors.encode(arrays | dict(probes or {}))
    info = AdapterInfo(
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rank=adapter.rank,
        source=_printable(adapter.path.resolve().name) or "adapter",
        source_sha256=sha256_file(adapter.path / WEIGHTS),
        base=_printable(Path(adapter.config.base).name) or "unknown",
        probe=bool(probes),
        pruning=pruning,
    )
    return data, info


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:200]


def named(given: str) -> tuple[str, Path]:
    """(name, folder) of NAME=FOLDER, or of a folder that has a name which can be one. Raises AdapterNameError."""
    name, equals, folder = given.partition("=")
    if equals and not Path(given).is_dir():
        return check_name(name), Path(folder)
    return check_name(Path(given).resolve().name), Path(given)


def add(path: Path, name: str, directory: Path, *, force: bool = False) -> Bundle:
    """Put a PEFT adapter into a bundle. force: replace one of that name.

    Raises AdapterError subclasses, BundleError where the bundle is damaged or cannot be written.
    """
    check_name(name)
    with _changing(path) as bundle:
        manifest = bundle.manifest
        if (path / FOLDER).is_symlink():
            raise BundlePathError(f"{path / FOLDER} is a link, expected a folder inside the bundle. Remove the link.")
        if manifest.lora is None:
            raise AdapterMismatchError(
                f"{path} was exported without inputs for adapters. Export the model again with --adapter {directory}, "
                "or with --adapter-targets all."
            )
        same = [have for have in manifest.adapters if have.lower() == name.lower()]
        if same and not force:
            raise AdapterNameError(f"{path} has an adapter {same[0]!a} already. Pass --force to replace it.")
        data, info = encode(read(directory), manifest.lora, manifest.model.dtype, manifest.provenance.source_sha256)
        left = {have: entry for have, entry in manifest.adapters.items() if have not in same}
        changed = replace(manifest, adapters={**left, name: info})
        _encoded(path, changed)
        with staged_file(path / path_of(name), data) as place:
            for old in same:
                bundle = _without(bundle, old)
            place()
        return _write(bundle, changed)


def remove(path: Path, name: str) -> Bundle:
    """Take an adapter out of a bundle. Raises AdapterNameError for an unknown one, BundleError as :func:`add` does."""
    with _changing(path) as bundle:
        require(bundle, name)
        return _without(bundle, name)


def require(bundle: Bundle, name: str) -> AdapterInfo:
    """The entry of an adapter. Raises AdapterNameError, with what was probably meant."""
    have = bundle.manifest.adapters
    if name not in have:
        hint = suggestion(name, have, "it has") if have else "it has none; add one with 'fstq adapter add'"
        raise AdapterNameError(f"{bundle.path} has no adapter {name[:80]!a}; {hint}")
    return have[name]


def load(bundle: Bundle, name: str) -> Adapter:
    """An adapter's matrices, its file checked against the manifest and the graph's inputs.

    Raises AdapterNameError, AdapterFormatError or AdapterMismatchError.
    """
    info, ports = require(bundle, name), bundle.manifest.lora
    path = bundle.path / path_of(name)
    kind = DTYPES.get(bundle.manifest.model.dtype)
    if ports is None or kind is None:
        raise AdapterMismatchError(f"{bundle.path} has no inputs for adapters in {', '.join(DTYPES)}.")
    arrays = {key: tensor.array() for key, tensor in tensors.read(path, info.sha256).items()}
    _check(path, arrays, ports, kind, info.probe)
    return Adapter(name, arrays, info.probe, info.pruning)


def _check(path: Path, arrays: Mapping[str, Array], ports: LoraPorts, dtype: np.dtype[Any], probe: bool) -> None:
    """A file in a bundle may come from anywhere, as the bundle itself may."""
    left = set(arrays)
    for one in ports.linears:
        a, b = (arrays.get(name) for name in one.ports)
        if a is None and b is None:
            continue
        left -= set(one.ports)
        fits = a is not None and b is not None and a.ndim == b.ndim == 2 and a.dtype == b.dtype == dtype
        if not fits or a is None or b is None or a.shape != (one.inputs, len(b)) or b.shape[1] != one.outputs:
            raise AdapterFormatError(f"{path}: {one.name} does not fit the graph. Add the adapter again.")
        if len(b) > ports.rank:
            raise AdapterFormatError(f"{path}: {one.name} has rank {len(b)}, expected at most {ports.rank}.")
    for name, shape in ports.probes.items():
        if name in left and arrays[name].shape == shape and arrays[name].dtype == np.float32:
            left.remove(name)
        if (name in arrays) != probe:
            raise AdapterFormatError(
                f"{path} {'lacks' if probe else 'holds'} {name[:80]!a}, but the manifest says that the adapter brings "
                f"{'all' if probe else 'no'} probes of its own. Add the adapter again."
            )
    if left:
        raise AdapterFormatError(f"{path}: {min(left)[:80]!a} is no input of the graph. Add the adapter again.")


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Bundle]:
    """The bundle as it is now, while nobody else changes its adapters; the disk's errors come out as BundleError."""
    bundle = Bundle.open(path, checksums=False)
    try:
        lock = os.open(path, os.O_RDONLY) if fcntl is not None else None
        try:
            if lock is not None:
                with contextlib.suppress(OSError):  # some network mounts have no locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield Bundle.open(bundle.path, checksums=False)
        finally:
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise BundleError(f"{path} cannot be changed: {error}. Check permissions and free space.") from error


def _without(bundle: Bundle, name: str) -> Bundle:
    left = {have: info for have, info in bundle.manifest.adapters.items() if have != name}
    changed = _write(bundle, replace(bundle.manifest, adapters=left))
    (bundle.path / path_of(name)).unlink(missing_ok=True)
    return changed


def _write(bundle: Bundle, manifest: Manifest) -> Bundle:
    replace_file(bundle.path / MANIFEST, _encoded(bundle.path, manifest))
    return Bundle.open(bundle.path, checksums=False)


def _encoded(path: Path, manifest: Manifest) -> bytes:
    data = manifest.to_json().encode()
    if len(data) > MANIFEST_CAP:
        raise BundleError(
            f"{path / MANIFEST} would have {len(data)} bytes, expected at most {MANIFEST_CAP}. Remove adapters with "
            "'fstq adapter remove'."
        )
    Manifest.from_json(data)
    return data
