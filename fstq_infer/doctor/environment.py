"""All that the doctor sees of a machine: files, commands, Python packages. A recording of it can be judged elsewhere.

Nothing here raises for a machine that lacks something: what cannot be read is None or absent.
"""

from __future__ import annotations

import glob
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from fstq_infer.errors import OptionError

FORMAT, VERSION = "fstq-environment", 1
LARGEST_TEXT = 64 << 10  # characters of one file or of one command's output
LARGEST_RECORD = 4 << 20  # bytes of a recording
SECONDS = 60.0  # a command may take
PYTHON = "python"  # as a command's first word: this interpreter


class Environment(Protocol):
    """A machine as the doctor sees it."""

    def read(self, path: str) -> str | None:
        """Text of a file (at most 64 KiB of it), without NUL bytes; None where it cannot be read."""

    def glob(self, pattern: str) -> list[str]:
        """Sorted paths that match."""

    def run(self, *command: str) -> str | None:
        """Standard output of a command that ended with 0; None where it is absent, failed or took too long."""

    def packages(self) -> Mapping[str, str]:
        """Installed Python distributions, lower-case name -> version."""


class Machine:
    """This machine."""

    def read(self, path: str) -> str | None:
        """See Environment."""
        try:
            with open(path, "rb") as stream:
                data = stream.read(LARGEST_TEXT)
        except OSError:
            return None
        return data.decode("utf-8", "replace").replace("\0", "\n").strip()

    def glob(self, pattern: str) -> list[str]:
        """See Environment."""
        return sorted(glob.glob(pattern))

    def run(self, *command: str) -> str | None:
        """See Environment."""
        words = [sys.executable, *command[1:]] if command[0] == PYTHON else list(command)
        try:
            done = subprocess.run(
                words,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=SECONDS,
                check=False,
                text=True,
                errors="replace",
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout[:LARGEST_TEXT].strip() if done.returncode == 0 else None

    def packages(self) -> Mapping[str, str]:
        """See Environment."""
        found = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
        return {name.lower().replace("_", "-"): version for name, version in found if name}


@dataclass
class Recorder:
    """Passes questions on to a machine and remembers the answers."""

    machine: Environment
    files: dict[str, str] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    installed: dict[str, str] = field(default_factory=dict)

    def read(self, path: str) -> str | None:
        """See Environment."""
        text = self.machine.read(path)
        if text is not None:
            self.files[path] = text
        return text

    def glob(self, pattern: str) -> list[str]:
        """See Environment."""
        found = self.machine.glob(pattern)
        if found:
            self.paths[pattern] = found
        return found

    def run(self, *command: str) -> str | None:
        """See Environment."""
        text = self.machine.run(*command)
        if text is not None:
            self.commands[label(command)] = text
        return text

    def packages(self) -> Mapping[str, str]:
        """See Environment."""
        self.installed.update(self.machine.packages())
        return self.installed

    def to_json(self) -> str:
        """Text that :meth:`Recording.parse` reads."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "files": self.files,
            "paths": self.paths,
            "commands": self.commands,
            "packages": self.installed,
        }
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True, slots=True)
class Recording:
    """A machine as it was recorded, or written down from documentation; ``paths`` may also follow from ``files``."""

    files: Mapping[str, str]
    paths: Mapping[str, list[str]]
    commands: Mapping[str, str]
    installed: Mapping[str, str]

    @classmethod
    def parse(cls, data: bytes, place: str) -> Recording:
        """Raises OptionError naming ``place`` and what is wrong, whatever the input."""
        if len(data) > LARGEST_RECORD:
            raise OptionError(
                f"{place} has more than {LARGEST_RECORD} bytes; expected a file of 'fstq doctor --record'"
            )
        try:
            top: Any = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{place} is no JSON: {error}; expected a file of 'fstq doctor --record'") from error
        if not isinstance(top, dict) or (top.get("format"), top.get("version")) != (FORMAT, VERSION):
            raise OptionError(f"{place} is no recording of format {FORMAT}, version {VERSION}; make one with --record")
        texts = [top.get(key, {}) for key in ("files", "commands", "packages")]
        paths = top.get("paths", {})
        whole = all(isinstance(part, dict) and all(isinstance(v, str) for v in part.values()) for part in texts)
        lists = isinstance(paths, dict) and all(
            isinstance(found, list) and all(isinstance(path, str) for path in found) for found in paths.values()
        )
        if not whole or not lists:
            raise OptionError(f"{place}: files, commands and packages must map texts to texts, paths texts to lists")
        return cls(texts[0], paths, texts[1], texts[2])

    def read(self, path: str) -> str | None:
        """See Environment."""
        return self.files.get(path)

    def glob(self, pattern: str) -> list[str]:
        """See Environment."""
        known = {path for path in self.files if fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")}
        return sorted(known.union(self.paths.get(pattern, ())))

    def run(self, *command: str) -> str | None:
        """See Environment."""
        return self.commands.get(label(command))

    def packages(self) -> Mapping[str, str]:
        """See Environment."""
        return self.installed


def label(command: tuple[str, ...]) -> str:
    """How a command is called in a recording; of Python code only its comment in the first line."""
    if command[:2] == (PYTHON, "-c"):
        return f"{PYTHON} {command[2].partition(chr(10))[0].lstrip('# ')}"
    return " ".join(command)


def replay(path: Path) -> Recording:
    """The recording in a file. Raises OptionError."""
    try:
        with path.open("rb") as stream:
            return Recording.parse(stream.read(LARGEST_RECORD + 1), str(path))
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error}; expected a file of 'fstq doctor --record'") from error
