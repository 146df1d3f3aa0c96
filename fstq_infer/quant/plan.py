"""A precision plan: which group of weights has which format. Its TOML text is for people, and read back strictly.

Knows the file, not the model: :meth:`Plan.check` compares it with the groups that a model has.
"""

from __future__ import annotations

import builtins
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fstq_infer.errors import OptionError, suggestion
from fstq_infer.quant.formats import FORMATS, named

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT, VERSION = "fstq-plan", 1
LARGEST = 4 << 20  # bytes of a plan's text
NAME = "plan.toml"


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that share a format: their names, the format, predicted damage (nats per token) and bytes with scales.

    parameters: number of weights in all of them.
    """

    weights: tuple[str, ...]
    format: str
    damage: float
    bytes: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Plan:
    """budget: what was asked for, in words."""

    groups: Mapping[str, Group]
    budget: str

    @property
    def bytes(self) -> int:
        """Of all weights in the plan."""
        return sum(group.bytes for group in self.groups.values())

    @property
    def bits(self) -> float:
        """Effective bits per weight, scales counted."""
        return 8 * self.bytes / max(1, sum(group.parameters for group in self.groups.values()))

    @property
    def damage(self) -> float:
        """Predicted rise of the loss in nats per token."""
        return sum(group.damage for group in self.groups.values())

    @property
    def formats(self) -> dict[str, str]:
        """Format of each group."""
        return {name: group.format for name, group in self.groups.items()}

    def to_toml(self) -> str:
        """The same text for equal plans."""
        lines = [
            "# Precision plan: the format of each group of weights. Edit formats, then export with --precision FILE.",
            f"# Formats: {', '.join(FORMATS)}.",
            "# damage: predicted rise of the loss, nats per token. bytes: codes and scales.",
            f"format = {_text(FORMAT)}",
            f"version = {VERSION}",
            f"budget = {_text(self.budget)}",
            f"bits = {self.bits:.4f}",
            f"bytes = {self.bytes}",
            f"damage = {_number(self.damage)}",
        ]
        for name, group in self.groups.items():
            lines += [
                "",
                f"[groups.{_text(name)}]",
                f"format = {_text(group.format)}",
                f"damage = {_number(group.damage)}",
                f"bytes = {group.bytes}",
                f"parameters = {group.parameters}",
                f"weights = [{', '.join(_text(weight) for weight in group.weights)}]",
            ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, data: builtins.bytes, place: str = NAME) -> Plan:
        """Raises OptionError naming ``place`` and what is wrong, whatever the input."""
        top = _Table(_load(data, place), place)
        if (found := (top.value("format", str), top.value("version", int))) != (FORMAT, VERSION):
            raise OptionError(f"{place} has format and version {found!a}, expected {(FORMAT, VERSION)!a}")
        top.only("format", "version", "budget", "bits", "bytes", "damage", "groups")
        groups: dict[str, Group] = {}
        for name, content in top.value("groups", dict).items():
            table = _Table(content, f"{place}, group {name!a:.80}")
            table.only("format", "damage", "bytes", "parameters", "weights")
            weights = table.value("weights", list)
            if not weights or not all(isinstance(weight, str) for weight in weights):
                raise OptionError(f"{table.place}: 'weights' must be a list of names that is not empty")
            try:
                form = named(table.value("format", str))
            except OptionError as error:
                raise OptionError(f"{table.place}: {error}") from error
            groups[name] = Group(
                tuple(weights),
                form.name,
                table.number("damage"),
                table.count("bytes"),
                table.count("parameters"),
            )
        return cls(groups, top.value("budget", str))

    def check(self, known: Mapping[str, Sequence[str]], place: str = NAME) -> None:
        """Raises OptionError, with a suggestion, unless the groups and their weights are those of ``known``."""
        for name, group in self.groups.items():
            if name not in known:
                raise OptionError(f"{place}: this model has no group {name!a:.80}; {suggestion(name, known)}")
            if set(group.weights) != set(known[name]):
                raise OptionError(
                    f"{place}, group {name!a}: its weights are {', '.join(group.weights)}, in this model they are "
                    f"{', '.join(known[name])}; take the names from a plan that 'fstq export' wrote for this model"
                )
        if missing := [name for name in known if name not in self.groups]:
            raise OptionError(
                f"{place}: no format is given for {len(missing)} groups, such as {missing[0]!a}; name every group"
            )


class _Table:
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


def _load(data: bytes, place: str) -> dict[str, Any]:
    if len(data) > LARGEST:
        raise OptionError(f"{place} has {len(data)} bytes; at most {LARGEST} are read")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise OptionError(f"{place} is no TOML: {error}; expected a plan as 'fstq export' writes it") from error


def _text(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else json.dumps(ascii(text)[1:-1])


def _number(value: float) -> str:
    """A TOML float."""
    text = f"{value:.6g}"
    return text if any(c in text for c in ".e") else f"{text}.0"
