"""Which linear layers of a graph take low-rank matrices, and how a model's own modules lie in them.

The part ``graph.lora`` of manifest.json (docs/bundle-format.md). Knows no file of an adapter and no backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fstq_infer.strict_json import JsonObject, is_integer

SCOPE = "lora"  # of the names of inputs, and of the nodes that read them
SIDES = ("A", "B")
MOST_RANK, MOST_WIDTH, MOST_RUNS = 1024, 1 << 24, 65536
NAME = "a layer's number and the path of a linear layer in it, such as 0.self_attn.q_proj"


def port(linear: str, side: str) -> str:
    """Name of a graph input."""
    return f"{SCOPE}.{linear}.{side}"


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the graph: ``y = x W + x A B``; x (rows, inputs), y (rows, outputs).

    module: the model's module that it is, or is a part of; of: that module's outputs. runs: which of these they are,
    in order, as (first, count).
    """

    name: str
    module: str
    inputs: int
    outputs: int
    of: int
    runs: tuple[tuple[int, int], ...]

    @property
    def ports(self) -> tuple[str, str]:
        """Names of the inputs A (rows, inputs, rank) and B (rows, rank, outputs)."""
        return port(self.name, "A"), port(self.name, "B")


@dataclass(frozen=True, slots=True)
class LoraPorts:
    """The linear layers that take low-rank matrices, in the graph's order, and the largest rank.

    probes: names of a pruning stage's probe weights that adapters may replace -> their shapes.
    """

    rank: int
    linears: tuple[Linear, ...]
    probes: Mapping[str, tuple[int, ...]]

    @property
    def modules(self) -> dict[str, tuple[Linear, ...]]:
        """The model's modules, each with the linear layers that it became."""
        found: dict[str, list[Linear]] = {}
        for linear in self.linears:
            found.setdefault(linear.module, []).append(linear)
        return {module: tuple(parts) for module, parts in found.items()}

    def to_json(self) -> dict[str, Any]:
        """For manifest.json."""
        linears = {
            one.name: {
                "module": one.module,
                "inputs": one.inputs,
                "outputs": one.outputs,
                "of": one.of,
                "runs": [number for run in one.runs for number in run],
            }
            for one in self.linears
        }
        return {
            "rank": self.rank,
            "linears": linears,
            "probes": {name: list(shape) for name, shape in sorted(self.probes.items())},
        }

    @classmethod
    def from_json(cls, data: JsonObject, layers: int) -> LoraPorts:
        """Raises ManifestError. layers: of the model."""
        linears, listed = [], data.nested("linears")
        widths: dict[str, tuple[int, int]] = {}  # module -> inputs, outputs
        for name in listed.data:
            one = listed.nested(name)
            number, _, path = name.partition(".")
            if not (number.isascii() and number.isdigit() and path and int(number[:9]) < layers):
                raise listed.bad(name, f"as its name {NAME}, below layer {layers}")
            outputs, of = one.integer("outputs", 1, MOST_WIDTH), one.integer("of", 1, MOST_WIDTH)
            module, inputs = one.text("module"), one.integer("inputs", 1, MOST_WIDTH)
            if widths.setdefault(module, (inputs, of)) != (inputs, of):
                expected = "'inputs' {} and 'of' {}, as another part of its module".format(*widths[module])
                raise listed.bad(name, expected)
            linears.append(Linear(name, module, inputs, outputs, of, _runs(one, outputs, of)))
        probes, shapes = data.nested("probes"), {}
        for name in probes.data:
            shape = probes.array(name)
            if not 0 < len(shape) <= 4 or not all(is_integer(size, 1, MOST_WIDTH) for size in shape):
                raise probes.bad(name, "one to four sizes above 0")
            shapes[name] = tuple(int(str(size)) for size in shape)
        return cls(data.integer("rank", 1, MOST_RANK), tuple(linears), shapes)


def _runs(data: JsonObject, outputs: int, of: int) -> tuple[tuple[int, int], ...]:
    expected = f"pairs of first output and count, {outputs} in all, within {of}"
    flat = data.get("runs", expected)
    if not isinstance(flat, list) or len(flat) % 2 or len(flat) > 2 * MOST_RUNS:
        raise data.bad("runs", expected)
    if not all(is_integer(number, 0, of) for number in flat):
        raise data.bad("runs", expected)
    runs = tuple(zip(flat[::2], flat[1::2], strict=True))
    if sum(count for _, count in runs) != outputs or any(first + count > of for first, count in runs):
        raise data.bad("runs", expected)
    return runs


def runs_of(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Numbers in order as runs of neighbours: 4, 5, 6, 0 is (4, 3), (0, 1)."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        first, count = runs[-1] if runs else (-1, 0)
        if count and first + count == row:
            runs[-1] = (first, count + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)
