"""Where engines live, what each is good for, and whether one is whole. Knows files and machines, no backend.

An engine is a directory with a sidecar, engine.json, written with it in one step. By default it lies under
``<cache>/engines/<key>``; the key covers everything that an engine depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fstq_infer.atomic import sha256_file
from fstq_infer.bundle import Bundle, FileEntry
from fstq_infer.errors import EngineError, EngineMismatchError
from fstq_infer.machine import available_memory
from fstq_infer.manifest import GRAPH_CONTRACT

try:
    import fcntl
except ImportError:  # outside POSIX builds are not serialised
    fcntl = None  # type: ignore[assignment]

FORMAT, LAYOUT, SIDECAR = "fstq-engine", 6, "engine.json"
SIDECAR_CAP = 1 << 20
PARTIAL = re.compile(r"\.[0-9a-f]{20}\.partial-[0-9]+")  # of a key, see fstq_infer/atomic.py
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Cpu:
    """A kind of CPU: readable description, and SHA-256 of machine type and instruction set extensions.

    what: "GPU" where an engine depends on that instead.
    """

    description: str
    sha256: str
    what: str = "CPU"


def this_cpu() -> Cpu:
    """The CPU of this machine, from /proc/cpuinfo on Linux."""
    machine, found = platform.machine(), dict[str, set[str]]()
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), set()).add(value.strip())
    features = sorted({word for name in ("flags", "Features") for line in found.get(name, ()) for word in line.split()})
    model = ", ".join(sorted(found.get("model name", ()) or found.get("CPU part", ()))) or platform.processor()
    digest = hashlib.sha256(" ".join([machine, *features]).encode()).hexdigest()
    return Cpu(f"{machine} {model} with {len(features)} CPU features", digest)


@dataclass(frozen=True, slots=True)
class Identity:
    """What an engine was built from, with and for. Two engines with equal identities can stand for each other.

    arguments: of ``fstq build``, where an engine depends on any.
    """

    bundle_sha256: str
    backend: str
    version: str
    cpu: Cpu
    arguments: str = ""

    @property
    def key(self) -> str:
        """Short name of the engine's directory."""
        parts = [self.bundle_sha256, self.backend, self.version, self.cpu.sha256, GRAPH_CONTRACT, LAYOUT]
        parts += [self.arguments] * bool(self.arguments)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """engine.json. ``peak_rss_bytes`` is that of the process that built it; ``parity`` says how it was checked.

    details: what a backend adds, such as profiles.
    """

    identity: Identity
    bundle_path: str
    files: Mapping[str, FileEntry]
    build_seconds: float
    peak_rss_bytes: int
    parity: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text."""
        data = {
            "format": FORMAT,
            "layout": LAYOUT,
            "key": self.identity.key,
            "backend": self.identity.backend,
            "version": self.identity.version,
            "machine": self.identity.cpu.description,
            "cpu_sha256": self.identity.cpu.sha256,
            "bundle_sha256": self.identity.bundle_sha256,
            "bundle_path": self.bundle_path,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "build_seconds": self.build_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "parity": dict(self.parity),
        }
        if self.identity.arguments:
            data |= {"arguments": self.identity.arguments, "device": self.identity.cpu.what}
        if self.details:
            data["details"] = dict(self.details)
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Sidecar:
        """Raises EngineError for a sidecar that is absent, damaged or of another version."""
        path = directory / SIDECAR
        try:
            with path.open("rb") as file:
                data = json.loads(file.read(SIDECAR_CAP))
            if (data["format"], data["layout"]) != (FORMAT, LAYOUT):
                raise ValueError(f"format {data['format']!r}, layout {data['layout']!r}, expected {FORMAT!r}, {LAYOUT}")
            files = {name: FileEntry(int(e["bytes"]), str(e["sha256"])) for name, e in data["files"].items()}
            if not files or any(Path(name).name != name for name in files):
                raise ValueError("no files, or a file outside the engine's directory")
            return cls(
                identity=Identity(
                    bundle_sha256=str(data["bundle_sha256"]),
                    backend=str(data["backend"]),
                    version=str(data["version"]),
                    cpu=Cpu(str(data["machine"]), str(data["cpu_sha256"]), str(data.get("device", "CPU"))),
                    arguments=str(data.get("arguments", "")),
                ),
                bundle_path=str(data["bundle_path"]),
                files=files,
                build_seconds=float(data["build_seconds"]),
                peak_rss_bytes=int(data["peak_rss_bytes"]),
                parity=dict(data["parity"]),
                details=dict(data.get("details", {})),
            )
        except OSError as error:
            raise EngineError(f"{directory} holds no engine: {error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise EngineError(f"{path} is damaged: {type(error).__name__} {error}.") from error

    def verify(self, directory: Path, checksums: bool = False) -> None:
        """Raise EngineError when a file is missing, has another size or, if asked, another checksum."""
        for name, entry in self.files.items():
            path = directory / name
            try:
                size = path.stat().st_size
                if size != entry.bytes:
                    raise EngineError(f"{path} is damaged: it has {size} bytes, expected {entry.bytes}.")
                if checksums and sha256_file(path) != entry.sha256:
                    raise EngineError(f"{path} is damaged: its content has changed since it was built.")
            except OSError as error:
                raise EngineError(f"{path} cannot be read: {error}.") from error

    def require(self, wanted: Identity, directory: Path, bundle: Bundle) -> None:
        """Raise EngineMismatchError, naming both sides and the command that rebuilds, unless the identity is this."""
        have = self.identity
        backends = [f"{side.backend} {side.version}" for side in (have, wanted)]
        cpus = [f"{side.cpu.description} ({side.cpu.sha256[:12]})" for side in (have, wanted)]
        differing = [
            f"{what} was {built}, now it is {now}"
            for what, same, built, now in (
                (
                    "the bundle",
                    have.bundle_sha256 == wanted.bundle_sha256,
                    f"{have.bundle_sha256[:12]} ({self.bundle_path})",
                    f"{wanted.bundle_sha256[:12]} ({bundle.path})",
                ),
                ("the backend", backends[0] == backends[1], *backends),
                (f"the {wanted.cpu.what}", have.cpu.sha256 == wanted.cpu.sha256, *cpus),
                (
                    "its settings",
                    have.arguments == wanted.arguments,
                    have.arguments or "none",
                    wanted.arguments or "none",
                ),
            )
            if not same
        ]
        if differing:
            raise EngineMismatchError(
                f"the engine in {directory} was built for something else: {'; '.join(differing)}. "
                f"Rebuild it with: {rebuild_command(bundle, directory, wanted)}"
            )


def rebuild_command(bundle: Bundle, directory: Path, identity: Identity) -> str:
    """The command line that builds anew; it writes into the cache."""
    command = f"fstq build {shlex.quote(str(bundle.path))} {identity.arguments} --force".replace("  ", " ")
    cached = directory.absolute() == default_directory(identity)
    return command if cached else f"{command} (which builds into the cache, not into {directory})"


def engines_root() -> Path:
    """$FSTQ_CACHE, $XDG_CACHE_HOME/fstq or ~/.cache/fstq; in there, ``engines``."""
    if own := os.environ.get("FSTQ_CACHE"):
        return Path(own).expanduser().absolute() / "engines"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "fstq" / "engines"


def default_directory(identity: Identity) -> Path:
    """Where an engine of that identity is cached."""
    return engines_root() / identity.key


@contextlib.contextmanager
def one_builder(directory: Path) -> Iterator[None]:
    """Let one process at a time build next to ``directory``: the others wait, then find the engine.

    In the cache this also removes what builders left that were killed while they built something else.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.parent, os.O_RDONLY) if fcntl is not None else None
    except OSError as error:
        raise EngineError(f"{directory} cannot be written: {error}. Set FSTQ_CACHE to another directory.") from error
    try:
        if lock is not None and _wait(lock) and directory.parent == engines_root():
            for path in directory.parent.iterdir():  # whoever holds the lock is the only one at work here
                if PARTIAL.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _wait(lock: int) -> bool:
    """Wait for the lock; False where locks do not work, as on some network mounts."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def require_memory(needed: int) -> None:
    """Raise EngineError when less memory is available; where that cannot be found out, try."""
    free = available_memory()
    if free is not None and free < needed:
        raise EngineError(
            f"building needs about {_mib(needed)} of memory, but {_mib(free)} are available. Close other programs, "
            "add swap, or build on another machine with the same CPU and copy the engine's directory."
        )


def require_disk(directory: Path, needed: int) -> None:
    """Raise EngineError when the disk of ``directory`` has less space."""
    place = next(folder for folder in directory.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise EngineError(
            f"the engine needs about {_mib(needed)} of disk space, but {place} has {_mib(free)}. Free some, or set "
            "FSTQ_CACHE to a directory on another disk."
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
