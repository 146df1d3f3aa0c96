"""Strict reading of tables into frozen dataclasses: an unknown key names the nearest, an error names file and key.

Values are what both TOML and Flower's run configuration hold: text, numbers, true and false.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fstq_infer.errors import ConfigError, OptionError, suggestion

T = TypeVar("T")
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def number(default: Any = dataclasses.MISSING, *, least: float = -math.inf, above: float = -math.inf,
           most: float = math.inf, below: float = math.inf) -> Any:  # fmt: skip
    """A field for a number: ``least`` <= value <= ``most``, ``above`` < value < ``below``."""
    bounds = {"least": least, "above": above, "most": most, "below": below}
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def choice(default: str, options: typing.Iterable[str]) -> Any:
    """A field for one of some texts."""
    return dataclasses.field(default=default, metadata={"options": tuple(options)})


def build(cls: type[T], table: Any, where: str, section: str = "") -> T:
    """An instance of a dataclass from a table. Raises ConfigError.

    where: file or place of the table. section: its name in there. Fields that are dataclasses are tables themselves;
    fields of type Mapping take any keys.
    """
    place = f"{where}: [{section}]" if section else where
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place} is {_shown(table)}, expected a table of keys and values.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(cls)
    if unknown := [key for key in table if key not in fields]:
        what = "table" if not section else "key"
        raise ConfigError(f"{place} has an unknown {what} {unknown[0]!a}; {suggestion(unknown[0], fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            values[name] = build(typing.cast(Any, kind), table.get(name, {}), where, name)
        elif name in table:
            values[name] = _value(table[name], kind, field.metadata, f"{place} {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{place} lacks the key '{name}', expected {_expected(kind)}. Add it.")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except OptionError as error:
        raise ConfigError(f"{place}: {error}") from error


def _value(value: Any, kind: Any, metadata: Mapping[str, Any], place: str) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is not None:  # Mapping[str, ...]: keys are for its user to check
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place} is {_shown(value)}, expected a table of keys and values.")
        return dict(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{place} is {_shown(value)}, expected {NAMES[kind]}.")
    options = metadata.get("options")
    if options is not None and value not in options:
        raise ConfigError(f"{place} is {value!a}; {suggestion(value, options)}")
    bounds = metadata.get("bounds")
    if bounds is not None and not _inside(value, bounds):
        texts = (("least", "at least"), ("above", "above"), ("most", "at most"), ("below", "below"))
        wanted = " and ".join(f"{text} {bounds[key]:g}" for key, text in texts if math.isfinite(bounds[key]))
        raise ConfigError(f"{place} is {value}, expected a number {wanted or 'that is finite'}.")
    return value


def _inside(value: float, bounds: Mapping[str, float]) -> bool:
    return (
        math.isfinite(value)
        and bounds["least"] <= value <= bounds["most"]
        and bounds["above"] < value < bounds["below"]
    )


def _expected(kind: Any) -> str:
    return NAMES.get(kind, "a table")


def _shown(value: Any) -> str:
    return f"{value!a}"[:60]
