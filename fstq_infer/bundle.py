"""The bundle: its manifest, a reader that trusts nothing, and a writer that leaves a whole bundle or none.

Implements docs/bundle-format.md, version 1. Knows files, names, sizes and checksums; knows no ONNX and no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from fstq_infer.atomic import PartialDirectory, atomic_directory, sha256_file
from fstq_infer.errors import (
    BundleChecksumError,
    BundleError,
    BundleNotFoundError,
    BundlePathError,
    BundleSizeError,
    BundleVersionError,
    ManifestError,
)
from fstq_infer.runtime.engine import Stage

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

FORMAT, VERSION, GRAPH_CONTRACT = "fstq-bundle", 1, 1
MANIFEST = "manifest.json"
MANIFEST_CAP = 1 << 20
FILE_CAPS: Mapping[str, int] = {  # name -> largest size in bytes
    "model.onnx": 256 << 20,
    "model.onnx.data": 64 << 30,
    "tokenizer.json": 64 << 20,
    "chat_template.jinja": 256 << 10,
    "report.json": 16 << 20,
    "report.html": 16 << 20,
}
REQUIRED_FILES = ("model.onnx", "tokenizer.json", "report.json")
DTYPES = ("float32", "float16", "bfloat16")
MAX_ITEMS = 4096  # of a list or of 'libraries'
MAX_TEXT = 4096  # characters
INT32, INT64 = 2**31 - 1, 2**63 - 1
REPAIR = "Fetch an undamaged copy of the bundle, or write it again with 'fstq export'."


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and lower-case hex SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was exported; ``parameters`` is a count, ``max_positions`` in tokens."""

    architecture: str
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    parameters: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Contract:
    """The quality contract: ``drop`` of ``metric`` against dense, as a fraction; below zero is better than dense."""

    met: bool
    metric: str
    max_drop: float
    drop: float


@dataclass(frozen=True, slots=True)
class Pruning:
    """Default keep ratio in (0, 1], the score that ranks tokens, and what was measured (None: nothing)."""

    keep: float
    score: str
    calibrated: bool
    contract: Contract | None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the bundle comes from; ``libraries`` maps names to versions."""

    source: str
    source_sha256: str
    libraries: Mapping[str, str]
    seed: int
    created: str
    tool: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json. Only :meth:`from_json` checks values; :meth:`BundleWriter.commit` passes through it too."""

    model: ModelInfo
    stages: tuple[Stage, ...]
    pruning: Pruning
    generation: GenerationDefaults
    provenance: Provenance
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """The same text for equal manifests. Raises ManifestError for a value that JSON does not have, like NaN."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "model": asdict(self.model),
            "graph": {"contract": GRAPH_CONTRACT, "stages": [asdict(stage) for stage in self.stages]},
            "pruning": asdict(self.pruning),
            "generation": asdict(self.generation),
            "provenance": asdict(self.provenance) | {"libraries": dict(sorted(self.provenance.libraries.items()))},
        }
        try:
            return json.dumps(data, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ManifestError(f"{MANIFEST} cannot be written: {error}. Use plain, finite Python values.") from error

    @classmethod
    def from_json(cls, data: str | bytes) -> Manifest:
        """Parse and check steps 2 to 4 of the spec, and the names of step 5.

        Raises ManifestError, BundleVersionError, BundlePathError; whatever the input, nothing else.
        """
        top = _Object(_load(data), "the manifest")
        top.choice("format", (FORMAT,))
        version = top.integer("version", -INT64, INT64)
        if version != VERSION:
            age, what_to_do = ("a newer", "Update fstq-infer") if version > VERSION else ("an older", "Export it again")
            raise BundleVersionError(
                f"{MANIFEST}: the bundle has version {version}, {age} one than version {VERSION}, which this "
                f"fstq-infer reads. {what_to_do}."
            )
        entries = top.nested("files")
        listed = {name: entries.nested(name) for name in entries.data}
        files = {
            name: FileEntry(entry.integer("bytes", 0, INT64), entry.sha256("sha256")) for name, entry in listed.items()
        }
        for name in REQUIRED_FILES:
            entries.nested(name)
        model = _model(top.nested("model"))
        manifest = cls(
            model=model,
            stages=_stages(top.nested("graph"), model.layers),
            pruning=_pruning(top.nested("pruning")),
            generation=_generation(top.nested("generation"), model.vocab_size),
            provenance=_provenance(top.nested("provenance")),
            files=files,
        )
        for name in files:
            if name not in FILE_CAPS:
                raise BundlePathError(
                    f"{MANIFEST}: 'files' holds {_show(name)}, expected only {', '.join(FILE_CAPS)}. {REPAIR}"
                )
        return manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that has passed the checks; ``manifest_sha256`` (hex) is its identity."""

    path: Path
    manifest: Manifest
    manifest_sha256: str

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
            found = {name: _regular_size(path / name) for name in manifest.files}
            for name, size in found.items():
                _check_size(path / name, manifest.files[name].bytes, FILE_CAPS[name])
                if size != manifest.files[name].bytes:
                    raise BundleSizeError(
                        f"{path / name} has {size} bytes, the manifest says {manifest.files[name].bytes}. {REPAIR}"
                    )
            for name, entry in manifest.files.items() if checksums else ():
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
            raise BundlePathError(f"{self.path} holds no {_show(name)}; it has {', '.join(self.manifest.files)}.")
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
                if name not in FILE_CAPS:
                    raise BundlePathError(
                        f"{self.path} holds {_show(name)}, which belongs to no bundle; expected only "
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


def _read_manifest(path: Path) -> bytes:
    """Steps 1 and 2: bytes of manifest.json, never more than 1 MiB of them."""
    file = path / MANIFEST
    if "\0" in str(path) or not path.is_dir() or not os.path.lexists(file):
        raise BundleNotFoundError(
            f"{str(path)!a} is no bundle: expected a directory with a {MANIFEST}. Check the path, or write a bundle "
            f"with 'fstq export'."
        )
    _check_size(file, _regular_size(file), MANIFEST_CAP)
    with file.open("rb") as stream:
        data = stream.read(MANIFEST_CAP + 1)
    _check_size(file, len(data), MANIFEST_CAP)
    return data


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


def _load(data: str | bytes) -> object:
    """JSON with unique keys and finite numbers. Raises ManifestError."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        result: object = json.loads(
            text, parse_constant=_no_constant, parse_int=_int, parse_float=_float, object_pairs_hook=_unique
        )
        return result
    except ManifestError:
        raise
    except RecursionError as error:
        raise ManifestError(f"{MANIFEST} is nested too deeply, expected five levels at most. {REPAIR}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ManifestError(f"{MANIFEST} is no UTF-8 JSON: {error}. {REPAIR}") from error


def _no_constant(text: str) -> object:
    raise ManifestError(f"{MANIFEST} holds {text}, expected finite numbers. {REPAIR}")


def _int(text: str) -> int:
    if len(text) > 20:  # int() takes quadratic time
        raise ManifestError(f"{MANIFEST} holds an integer of {len(text)} digits, expected at most 64 bits. {REPAIR}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ManifestError(f"{MANIFEST} holds {_show(text)}, expected finite numbers. {REPAIR}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ManifestError(f"{MANIFEST} holds the key {_show(key)} twice in one object. {REPAIR}")
        result[key] = value
    return result


def _show(value: object) -> str:
    """A value in a message: short, ASCII (a lone surrogate cannot be printed) and never recursive."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} items"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value[:60]!a}{'...' if len(value) > 60 else ''}" if isinstance(value, str) else repr(value)


class _Object:
    """One JSON object and its place in the manifest; each getter raises ManifestError for what is absent or wrong."""

    def __init__(self, data: object, place: str) -> None:
        if not isinstance(data, dict):
            raise ManifestError(f"{MANIFEST}: {place} is {_show(data)}, expected an object. {REPAIR}")
        self.data: dict[str, object] = data
        self.place = place

    def bad(self, key: str, expected: str) -> ManifestError:
        found = f"is {_show(self.data[key])}" if key in self.data else "is missing"
        return ManifestError(f"{MANIFEST}: {_show(key)} in {self.place} {found}, expected {expected}. {REPAIR}")

    def get(self, key: str, expected: str) -> object:
        if key not in self.data:
            raise self.bad(key, expected)
        return self.data[key]

    def nested(self, key: str) -> _Object:
        return _Object(self.get(key, "an object"), _show(key))

    def array(self, key: str) -> list[object]:
        expected = f"a list of at most {MAX_ITEMS} items"
        value = self.get(key, expected)
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise self.bad(key, expected)
        return value

    def text(self, key: str) -> str:
        expected = f"a text of 1 to {MAX_TEXT} characters without control characters"
        value = self.get(key, expected)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
            raise self.bad(key, expected)
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            raise self.bad(key, expected)  # they would end up on a terminal
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.get(key, " or ".join(choices))
        if not isinstance(value, str) or value not in choices:
            raise self.bad(key, " or ".join(choices))
        return value

    def sha256(self, key: str) -> str:
        value = self.get(key, "64 hexadecimal digits")
        if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise self.bad(key, "64 lower-case hexadecimal digits")
        return value

    def boolean(self, key: str) -> bool:
        value = self.get(key, "true or false")
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        expected = f"an integer from {low} to {high}"
        value = self.get(key, expected)
        if not _is_integer(value, low, high):
            raise self.bad(key, expected)
        return value

    def number(
        self, key: str, low: float | None = None, high: float | None = None, above: float | None = None
    ) -> float:
        """A finite number, at least ``low``, at most ``high``, greater than ``above``."""
        limits = ((low, "at least"), (high, "at most"), (above, "more than"))
        expected = " and ".join(["a number", *(f"{word} {limit:g}" for limit, word in limits if limit is not None)])
        value = self.get(key, expected)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key, expected)
        too_low = (low is not None and value < low) or (above is not None and value <= above)
        if too_low or (high is not None and value > high):
            raise self.bad(key, expected)
        return float(value)


def _is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _model(data: _Object) -> ModelInfo:
    return ModelInfo(
        architecture=data.text("architecture"),
        model_type=data.text("model_type"),
        layers=data.integer("layers", 1, INT32),
        hidden_size=data.integer("hidden_size", 1, INT32),
        vocab_size=data.integer("vocab_size", 1, INT32),
        max_positions=data.integer("max_positions", 1, INT32),
        parameters=data.integer("parameters", 1, INT64),
        dtype=data.choice("dtype", DTYPES),
    )


def _stages(data: _Object, layers: int) -> tuple[Stage, ...]:
    data.integer("contract", GRAPH_CONTRACT, GRAPH_CONTRACT)
    stages: list[Stage] = []
    for index, item in enumerate(data.array("stages")):
        stage = _Object(item, f"stage {index} of 'graph'")
        lowest = stages[-1].layer + 1 if stages else 1
        stages.append(
            Stage(
                layer=stage.integer("layer", lowest, layers - 1),
                sink=stage.integer("sink", 0, INT32),
                window=stage.integer("window", 0, INT32),
            )
        )
    return tuple(stages)


def _pruning(data: _Object) -> Pruning:
    contract = None
    if data.get("contract", "an object or null") is not None:
        measured = data.nested("contract")
        contract = Contract(
            met=measured.boolean("met"),
            metric=measured.text("metric"),
            max_drop=measured.number("max_drop", low=0),
            drop=measured.number("drop"),
        )
    return Pruning(data.number("keep", above=0, high=1), data.text("score"), data.boolean("calibrated"), contract)


def _generation(data: _Object, vocab_size: int) -> GenerationDefaults:
    begin = None
    if data.get("bos_token_id", "a token id or null") is not None:
        begin = data.integer("bos_token_id", 0, vocab_size - 1)
    ends = []
    for token in data.array("eos_token_ids"):
        if not _is_integer(token, 0, vocab_size - 1):
            raise data.bad("eos_token_ids", f"token ids from 0 to {vocab_size - 1}, but one is {_show(token)}")
        ends.append(token)
    return GenerationDefaults(
        bos_token_id=begin,
        eos_token_ids=tuple(ends),
        temperature=data.number("temperature", low=0),
        top_k=data.integer("top_k", 0, INT32),
        top_p=data.number("top_p", above=0, high=1),
        repetition_penalty=data.number("repetition_penalty", above=0),
    )


def _provenance(data: _Object) -> Provenance:
    libraries = data.nested("libraries")
    if len(libraries.data) > MAX_ITEMS:
        raise data.bad("libraries", f"at most {MAX_ITEMS} names and versions")
    return Provenance(
        source=data.text("source"),
        source_sha256=data.sha256("source_sha256"),
        libraries={name: libraries.text(name) for name in libraries.data},
        seed=data.integer("seed", 0, INT64),
        created=data.text("created"),
        tool=data.text("tool"),
    )
