"""The bundle: a reader that trusts nothing, and a writer that leaves a whole bundle or none.

Implements docs/bundle-format.md, version 1. Knows files, names, sizes and checksums; knows no ONNX and no tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from fstq_infer.adapters.info import FOLDER, path_of
from fstq_infer.adapters.tensors import FILE_CAP
from fstq_infer.atomic import PartialDirectory, atomic_directory, sha256_file
from fstq_infer.errors import (
    BundleChecksumError,
    BundleError,
    BundleNotFoundError,
    BundlePathError,
    BundleSizeError,
)
from fstq_infer.manifest import (
    FILE_CAPS,
    Contract,
    FileEntry,
    GenerationDefaults,
    Manifest,
    ModelInfo,
    Provenance,
    Pruning,
)
from fstq_infer.strict_json import MANIFEST, REPAIR, show

__all__ = [
    "Bundle",
    "BundleWriter",
    "Contract",
    "FileEntry",
    "GenerationDefaults",
    "Manifest",
    "ModelInfo",
    "Provenance",
    "Pruning",
    "atomic_directory",
    "sha256_file",
]

MANIFEST_CAP = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that has passed the checks; ``manifest_sha256`` (hex) is its identity."""

    path: Path
    manifest: Manifest
    manifest_sha256: str

    @property
    def model_sha256(self) -> str:
        """Identity of everything but the adapters, on which engines depend: those come and go beside a built engine."""
        return hashlib.sha256(replace(self.manifest, adapters={}).to_json().encode()).hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str], checksums: bool = True) -> Bundle:
        """Read and check a bundle in the order of the spec; ``checksums=False`` skips step 7, which reads every file.

        Raises the subclass of BundleError that the spec names for each check, BundleError for a file that cannot be
        read. Files that the manifest does not list are not looked at.
        """
        path = Path(path)
        try:
            data = _read_manifest(path)
            try:
                manifest = Manifest.from_json(data)
            except BundleError as error:  # its message starts with the file's name
                raise type(error)(f"{path}{os.sep}{error}") from error
            files = _entries(path, manifest)
            found = {name: _regular_size(path / name) for name in files}
            for name, size in found.items():
                _check_size(path / name, files[name].bytes, FILE_CAPS.get(name, FILE_CAP))
                if size != files[name].bytes:
                    raise BundleSizeError(
                        f"{path / name} has {size} bytes, the manifest says {files[name].bytes}. {REPAIR}"
                    )
            for name, entry in files.items() if checksums else ():
                digest = sha256_file(path / name, entry.bytes)
                if digest != entry.sha256:
                    raise BundleChecksumError(
                        f"{path / name} has SHA-256 {digest}, the manifest says {entry.sha256}: its content has "
                        f"changed. {REPAIR}"
                    )
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}. Check its permissions and the disk.") from error
        return cls(path, manifest, hashlib.sha256(data).hexdigest())

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files. Raises BundlePathError for a name that this bundle does not hold."""
        if name != MANIFEST and name not in self.manifest.files:
            raise BundlePathError(f"{self.path} holds no {show(name)}; it has {', '.join(self.manifest.files)}.")
        return self.path / name


class BundleWriter:
    """Context manager: write files into ``path``, then :meth:`commit`; leaving without a commit removes them.

    out: where the bundle will be; with ``overwrite`` an empty directory or a bundle there is replaced.
    Entering raises BundleExistsError or BundleError (see fstq_infer/atomic.py) before any work is done.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False) -> None:
        self._partial = PartialDirectory(out, overwrite, marker=MANIFEST)

    @property
    def path(self) -> Path:
        """The hidden directory to write into."""
        return self._partial.path

    def __enter__(self) -> BundleWriter:
        self._partial.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.__exit__(kind, error, trace)

    def commit(self, manifest: Manifest) -> Bundle:
        """Fill in ``files``, write manifest.json and put the bundle in place; returns it.

        Raises BundlePathError or BundleSizeError for a file that a bundle may not hold, ManifestError for a manifest
        that no reader would accept, BundleExistsError, or BundleError when the disk fails.
        """
        files = {}
        try:
            for name in sorted(os.listdir(self.path)):
                if name == FOLDER and manifest.adapters:
                    continue
                if name not in FILE_CAPS:
                    raise BundlePathError(
                        f"{self.path} holds {show(name)}, which belongs to no bundle; expected only "
                        f"{', '.join(FILE_CAPS)}. Write it somewhere else."
                    )
                size = _regular_size(self.path / name)
                _check_size(self.path / name, size, FILE_CAPS[name])
                files[name] = FileEntry(size, sha256_file(self.path / name, size))
            data = replace(manifest, files=files).to_json().encode()
            _check_size(self.path / MANIFEST, len(data), MANIFEST_CAP)
            checked = Manifest.from_json(data)
            (self.path / MANIFEST).write_bytes(data)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error}. Check permissions and free space.") from error
        self._partial.commit()
        return Bundle(self._partial.out, checked, hashlib.sha256(data).hexdigest())


def _entries(path: Path, manifest: Manifest) -> dict[str, FileEntry]:
    """All files of a bundle by their path in it. Raises BundlePathError where the adapters' folder is a link."""
    entries = dict(manifest.files)
    if manifest.adapters and (path / FOLDER).is_symlink():
        raise BundlePathError(f"{path / FOLDER} is a link, expected a folder inside the bundle. {REPAIR}")
    entries |= {path_of(name): FileEntry(one.bytes, one.sha256) for name, one in manifest.adapters.items()}
    return entries


def _read_manifest(path: Path) -> bytes:
    """Steps 1 and 2: bytes of manifest.json, never more than 1 MiB of them."""
    file = path / MANIFEST
    if "\0" in str(path) or not path.is_dir() or not os.path.lexists(file):
        raise BundleNotFoundError(
            f"{str(path)!a} is no bundle: expected a directory with a {MANIFEST}. {_instead(str(path))}"
        )
    _check_size(file, _regular_size(file), MANIFEST_CAP)
    with file.open("rb") as stream:
        data = stream.read(MANIFEST_CAP + 1)
    _check_size(file, len(data), MANIFEST_CAP)
    return data


def _instead(path: str) -> str:
    """What to do about a path that is no bundle, by what lies there."""
    if "\0" not in path:
        if os.path.isfile(os.path.join(path, "config.json")):
            return f"A Hugging Face model is there; make a bundle of it: fstq export {path!a} --out my.bundle."
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            return "A LoRA adapter is there; give the bundle's directory, and the adapter to 'fstq adapter add'."
        if os.path.isfile(path) and os.path.isfile(os.path.join(os.path.dirname(path), MANIFEST)):
            return f"It is a file of one: give {os.path.dirname(path) or os.curdir!a} instead."
    return "Check the path, or write a bundle with 'fstq export'."


def _regular_size(path: Path) -> int:
    """Size in bytes by lstat. Raises BundlePathError unless ``path`` is a regular file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError as error:
        raise BundlePathError(f"{path} does not exist, but its bundle needs it. {REPAIR}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise BundlePathError(f"{path} is {kind}, expected a regular file inside the bundle. {REPAIR}")
    return status.st_size


def _check_size(path: Path, size: int, cap: int) -> None:
    if size > cap:
        raise BundleSizeError(f"{path}: {size} bytes are more than the {cap} that a bundle may hold. {REPAIR}")
