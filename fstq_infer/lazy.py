"""Loading a part of the toolkit by name, when it is needed; a missing library is reported with its install command."""

from __future__ import annotations

import importlib
from typing import Any

from fstq_infer.errors import MissingExtraError

OWN = ("fstq_infer", "fstq_export", "fstq_engines")


def load(target: str, needed_for: str, extra: str) -> Any:
    """The object behind ``"module:name"``. Raises MissingExtraError when a library of that extra is not installed."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.partition(".")[0] in OWN:
            raise
        raise MissingExtraError(needed_for, missing, extra) from error
