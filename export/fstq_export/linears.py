"""Which of the model's modules a graph's linear layers are: the exporter renames them and takes fused ones apart.

Rows are compared by their numbers, as in :mod:`fstq_export.passes.quantize`; the first columns are enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from fstq_export.passes.lora import linear_nodes
from fstq_export.passes.quantize import fingerprints
from fstq_export.reference import skeleton
from fstq_export.source import Source
from fstq_infer.adapters.ports import Linear, runs_of
from fstq_infer.errors import UnsupportedModelError

COLUMNS = 128  # of a weight's rows that are compared
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
Prints = NDArray[np.uint64]


def find(source: Source, graph: ir.Graph, dtype: str) -> dict[str, Linear]:
    """Every linear layer of the graph's decoder layers by name. Raises UnsupportedModelError for one that is no module.

    graph: before its weights become codes.
    """
    known = _modules(source, np.dtype(dtype))
    places: dict[tuple[int, int], dict[int, list[tuple[str, int]]]] = {}
    found = {}
    for name, node in linear_nodes(graph).items():
        weight = node.inputs[1]
        if weight is None or weight.const_value is None:
            continue
        array = weight.const_value.numpy()
        inputs, outputs = array.shape
        seen = fingerprints(np.ascontiguousarray(array[:COLUMNS].T))
        own = str(weight.name).removesuffix("_t").removesuffix(".weight")
        module = next((m for m in (own, *known) if m in known and _same(known[m], inputs, seen)), None)
        if module is not None:
            found[name] = Linear(name, module, inputs, outputs, outputs, ((0, outputs),))
            continue
        index = places.setdefault((inputs, 0), _index(known, inputs))
        module, rows = _rows(index, seen, name, source.architecture)
        found[name] = Linear(name, module, inputs, outputs, len(known[module][1]), runs_of(rows))
    return found


def is_turned(module: nn.Module) -> bool:
    """Whether a module's weight is (inputs, outputs)."""
    return isinstance(module, Conv1D)


def keys_of(source: Source) -> dict[str, tuple[str, bool]]:
    """Key of the checkpoint -> (linear module, whether its weight is (inputs, outputs))."""
    modules = skeleton(source.config).named_modules()
    wanted = {f"{n}.weight": (n, is_turned(m)) for n, m in modules if isinstance(m, nn.Linear | Conv1D)}
    found = {}
    for path in sorted(source.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                own = key if key in wanted else next((name for name in wanted if name.endswith(f".{key}")), None)
                if own is not None:
                    found[key] = wanted[own]
    return found


def shapes_of(source: Source) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """(inputs, outputs) and the decoder layer of each linear module in a decoder layer, by name."""
    shapes, layers = {}, {}
    for name, module in skeleton(source.config).named_modules():
        match = _LAYER.search(name)
        if match and isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            shapes[name] = (rows, columns) if is_turned(module) else (columns, rows)
            layers[name] = int(match.group(1))
    return shapes, layers


def _modules(source: Source, dtype: np.dtype[Any]) -> dict[str, tuple[int, Prints]]:
    """module -> (inputs, fingerprints of its outputs' rows), of every linear module in the checkpoint."""
    keys, found = keys_of(source), {}
    for key, array in _weights(source):
        if key not in keys:
            continue
        name, turned = keys[key]
        rows = array.T if turned else array
        found[name] = (rows.shape[1], fingerprints(np.ascontiguousarray(rows[:, :COLUMNS]).astype(dtype)))
    return found


def _weights(source: Source) -> Iterator[tuple[str, NDArray[Any]]]:
    """The checkpoint's matrices, one at a time, in float32."""
    for path in sorted(source.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                if len(file.get_slice(key).get_shape()) == 2:
                    yield key, file.get_tensor(key).float().numpy()


def _same(module: tuple[int, Prints], inputs: int, seen: Prints) -> bool:
    return module[0] == inputs and np.array_equal(module[1], seen)


def _index(known: Mapping[str, tuple[int, Prints]], inputs: int) -> dict[int, list[tuple[str, int]]]:
    """fingerprint -> where it is, among modules of so many inputs."""
    found: dict[int, list[tuple[str, int]]] = {}
    for module, (columns, prints) in known.items():
        if columns == inputs:
            for row, print_ in enumerate(prints.tolist()):
                found.setdefault(print_, []).append((module, row))
    return found


def _rows(
    index: Mapping[int, list[tuple[str, int]]], seen: Prints, name: str, architecture: str
) -> tuple[str, list[int]]:
    """(module, its outputs that a linear layer holds). Rows that occur twice cannot be told apart."""
    places = [index.get(print_, []) for print_ in seen.tolist()]
    owners = {place[0][0] for place in places if len(place) == 1}
    if len(owners) != 1 or any(len(place) != 1 for place in places):
        raise UnsupportedModelError(
            f"{architecture}: the graph's linear layer {name} is none of the model's modules, nor a part of one, so "
            "adapters cannot be fitted to it. Merge the adapter instead (--merge-adapter)"
        )
    return owners.pop(), [place[0][1] for place in places]
