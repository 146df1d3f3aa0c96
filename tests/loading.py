"""Scripts beside the files that they make, as modules: tests build variants with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_make(folder: Path) -> ModuleType:
    """``folder``/make.py."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_make", folder / "make.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
