"""TOML that people may edit, read strictly: every value's type and range is checked as it is taken."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from fstq_infer.errors import OptionError, suggestion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


class Table:
    """A TOML table whose values are checked as they are taken."""

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

    def text_or_none(self, key: str) -> str | None:
        """A text, or None where the key is absent."""
        found: str | None = self.value(key, str) if key in self.data else None
        return found

    def number(self, key: str, above: bool = False) -> float:
        """A finite number of at least 0, or above 0."""
        found = self.data.get(key)
        if (
            isinstance(found, bool)
            or not isinstance(found, int | float)
            or not 0 <= found < math.inf
            or (above and not found)
        ):
            least = "above 0" if above else "of at least 0"
            raise OptionError(f"{self.place}: {key!a} must be a number {least}, found {found!a:.80}")
        return float(found)

    def count(self, key: str, least: int = 0) -> int:
        """A whole number of at least ``least``."""
        found: int = self.value(key, int)
        if found < least:
            raise OptionError(f"{self.place}: {key!a} must be at least {least}, found {found}")
        return found

    def checked(self, check: Callable[[Any], T], value: Any) -> T:
        """What ``check`` makes of a value; its OptionError names this table."""
        try:
            return check(value)
        except OptionError as error:
            raise OptionError(f"{self.place}: {error}") from error

    def format(self, name: str, version: int) -> None:
        """Raises OptionError unless the file says that it is this."""
        if (found := (self.value("format", str), self.value("version", int))) != (name, version):
            raise OptionError(f"{self.place} has format and version {found!a}, expected {(name, version)!a}")


def load(data: bytes, place: str, largest: int, expected: str) -> dict[str, Any]:
    if len(data) > largest:
        raise OptionError(f"{place} has {len(data)} bytes; at most {largest} are read")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise OptionError(f"{place} is no TOML: {error}; expected {expected}") from error


def text(given: str) -> str:
    """A TOML basic string."""
    return json.dumps(given, ensure_ascii=False) if given.isprintable() else json.dumps(ascii(given)[1:-1])


def number(value: float) -> str:
    """A TOML float."""
    found = f"{value:.6g}"
    return found if any(c in found for c in ".e") else f"{found}.0"
