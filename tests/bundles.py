"""Bundles for tests: make.py of the corrupt corpus, and what several test files do with it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fstq_infer import errors
from fstq_infer.bundle import Bundle
from fstq_infer.manifest import Manifest
from tests.loading import load_make

CORRUPT = Path(__file__).parent / "corrupt"
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file types and signals")

make = load_make(CORRUPT)
BARE = replace(Manifest.from_json(make.encode(make.manifest())), files={})  # what an exporter hands to commit()


def write(path: Path, data: Any = None, raw: bytes | None = None) -> Path:
    """A bundle at ``path`` with make.py's files and the given manifest."""
    path.mkdir()
    for name, content in make.CONTENT.items():
        (path / name).write_bytes(content)
    (path / "manifest.json").write_bytes(make.encode(data or make.manifest()) if raw is None else raw)
    return path


def fails(error: type[errors.BundleError], path: Path, match: str | None = None) -> None:
    """Opening raises exactly ``error``, with a message that a terminal can print and that says what to do."""
    with pytest.raises(error, match=match) as caught:
        Bundle.open(path)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()


def fill(path: Path, names: tuple[str, ...] = tuple(make.CONTENT)) -> None:
    for name in names:
        (path / name).write_bytes(make.CONTENT[name])


def listing(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def name_of(value: Any) -> str:
    """A short id for a parameter."""
    return ".".join(map(str, value)) if isinstance(value, tuple) else repr(value)[:20]
