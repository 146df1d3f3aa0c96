"""Reading TOML strictly: sizes, types and unknown keys are checked as values are taken. Knows no schema."""

from __future__ import annotations

import math
import sys
from typing import Any

from fstq_infer.errors import OptionError, suggestion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(data: bytes, place: str, largest: int, expected: str) -> dict[str, Any]:
    """The table of a file of at most ``largest`` bytes. Raises OptionError naming ``place`` and what was expected."""
    if len(data) > largest:
        raise OptionError(f"{place} has {len(data)} bytes; at most {largest} are read")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise OptionError(f"{place} is no TOML: {error}; expected {expected}") from error


class Table:
    """A TOML table whose values are checked as they are taken; every complaint is an OptionError naming ``place``."""

    def __init__(self, data: object, place: str) -> None:
        if not isinstance(data, dict):
            raise OptionError(f"{place}: expected a table")
        self.data, self.place = data, place

    def only(self, *known: str) -> None:
        """Raises OptionError for another key."""
        for key in self.data:
            if key not in known:
                meant = suggestion(key, known)
                raise OptionError(f"{self.place}: there is no key {key!a:.80}; {meant}")

    def value(self, key: str, kind: type) -> Any:
        """The value of that key and type."""
        found = self.data.get(key)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise OptionError(f"{self.place}: {key!a} must be of type {kind.__name__}, found {found!a:.80}")
        return found

    def number(self, key: str) -> float:
        """A finite number of at least 0."""
        found = self.data.get(key)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
            raise OptionError(f"{self.place}: {key!a} must be a number of at least 0, found {found!a:.80}")
        return float(found)

    def count(self, key: str) -> int:
        """A whole number of at least 0."""
        found: int = self.value(key, int)
        if found < 0:
            raise OptionError(f"{self.place}: {key!a} must be at least 0, found {found}")
        return found

    def table(self, key: str) -> Table:
        """The table of that key."""
        return Table(self.value(key, dict), f"{self.place}, {key}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings that is not empty."""
        found = self.value(key, list)
        if not found or not all(isinstance(item, str) for item in found):
            raise OptionError(f"{self.place}: {key!a} must be a list of texts that is not empty, found {found!a:.80}")
        return tuple(found)
