"""manifest.json as strict JSON: unique keys, finite numbers, and getters that check types and ranges.

Knows the file's name and the wording of its errors; what the manifest holds is for manifest.py to say.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import TypeGuard

from fstq_infer.errors import ManifestError

MANIFEST = "manifest.json"
MAX_ITEMS = 4096  # of a list or of 'libraries'
MAX_TEXT = 4096  # characters
INT32, INT64 = 2**31 - 1, 2**63 - 1
REPAIR = "Fetch an undamaged copy of the bundle, or write it again with 'fstq export'."


def load(data: str | bytes) -> object:
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
        raise ManifestError(f"{MANIFEST} holds {show(text)}, expected finite numbers. {REPAIR}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ManifestError(f"{MANIFEST} holds the key {show(key)} twice in one object. {REPAIR}")
        result[key] = value
    return result


def show(value: object) -> str:
    """A value in a message: short, ASCII (a lone surrogate cannot be printed) and never recursive."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} items"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value[:60]!a}{'...' if len(value) > 60 else ''}" if isinstance(value, str) else repr(value)


class JsonObject:
    """One JSON object and its place in the manifest; each getter raises ManifestError for what is absent or wrong."""

    def __init__(self, data: object, place: str) -> None:
        if not isinstance(data, dict):
            raise ManifestError(f"{MANIFEST}: {place} is {show(data)}, expected an object. {REPAIR}")
        self.data: dict[str, object] = data
        self.place = place

    def bad(self, key: str, expected: str) -> ManifestError:
        found = f"is {show(self.data[key])}" if key in self.data else "is missing"
        return ManifestError(f"{MANIFEST}: {show(key)} in {self.place} {found}, expected {expected}. {REPAIR}")

    def get(self, key: str, expected: str) -> object:
        if key not in self.data:
            raise self.bad(key, expected)
        return self.data[key]

    def nested(self, key: str) -> JsonObject:
        return JsonObject(self.get(key, "an object"), show(key))

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
        if not is_integer(value, low, high):
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


def is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
