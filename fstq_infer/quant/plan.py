"""A precision plan: which group of weights has which format. Its TOML text is for people, and read back strictly.

Knows the file, not the model: :meth:`Plan.check` compares it with the groups that a model has.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fstq_infer.errors import OptionError, suggestion
from fstq_infer.quant.formats import FORMATS, named
from fstq_infer.quant.toml import Table, load, number, text

FORMAT, VERSION = "fstq-plan", 1
LARGEST = 4 << 20  # bytes of a plan's text
NAME = "plan.toml"
OPTIONAL = ("trained", "divergence", "latency", "latency_of")


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
    """budget: what was asked for, in words. trained: steps that its codes were trained for, and what divergence was
    left on other texts, nats per token. latency: predicted seconds in all matrices, and what they are of.
    """

    groups: Mapping[str, Group]
    budget: str
    trained: int | None = None
    divergence: float | None = None
    latency: float | None = None
    latency_of: str | None = None

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
            f"format = {text(FORMAT)}",
            f"version = {VERSION}",
            f"budget = {text(self.budget)}",
            f"bits = {self.bits:.4f}",
            f"bytes = {self.bytes}",
            f"damage = {number(self.damage)}",
        ]
        if self.trained is not None and self.divergence is not None:
            lines += [
                "# Codes were trained for so many steps; divergence from the unquantized model then, nats per token.",
                f"trained = {self.trained}",
                f"divergence = {number(self.divergence)}",
            ]
        if self.latency is not None and self.latency_of is not None:
            lines += [
                "# Predicted seconds in all matrices, attention and the rest not counted.",
                f"latency = {number(self.latency)}",
                f"latency_of = {text(self.latency_of)}",
            ]
        for name, group in self.groups.items():
            lines += [
                "",
                f"[groups.{text(name)}]",
                f"format = {text(group.format)}",
                f"damage = {number(group.damage)}",
                f"bytes = {group.bytes}",
                f"parameters = {group.parameters}",
                f"weights = [{', '.join(text(weight) for weight in group.weights)}]",
            ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, data: builtins.bytes, place: str = NAME) -> Plan:
        """Raises OptionError naming ``place`` and what is wrong, whatever the input."""
        top = Table(load(data, place, LARGEST, "a plan as 'fstq export' writes it"), place)
        top.format(FORMAT, VERSION)
        top.only("format", "version", "budget", "bits", "bytes", "damage", "groups", *OPTIONAL)
        groups: dict[str, Group] = {}
        for name, content in top.value("groups", dict).items():
            table = Table(content, f"{place}, group {name!a:.80}")
            table.only("format", "damage", "bytes", "parameters", "weights")
            weights = table.value("weights", list)
            if not weights or not all(isinstance(weight, str) for weight in weights):
                raise OptionError(f"{table.place}: 'weights' must be a list of names that is not empty")
            form = table.checked(lambda given: named(given).name, table.value("format", str))
            groups[name] = Group(
                tuple(weights),
                form,
                table.number("damage"),
                table.count("bytes"),
                table.count("parameters"),
            )
        steps = top.count("trained") if "trained" in top.data else None
        divergence, latency = (top.number(key) if key in top.data else None for key in ("divergence", "latency"))
        return cls(groups, top.value("budget", str), steps, divergence, latency, top.text_or_none("latency_of"))

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
