"""A PEFT adapter fitted to a graph: its matrices as the inputs ``lora.*`` take them. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters.peft import Peft, check_targets
from fstq_infer.adapters.ports import Linear, LoraPorts
from fstq_infer.errors import AdapterMismatchError

Matrix = NDArray[np.float32]


def modules(linears: Sequence[Linear]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each of the model's modules that the linear layers are."""
    return {one.module: (one.inputs, one.of) for one in linears}


def layers(linears: Sequence[Linear]) -> dict[str, int]:
    """The decoder layer of each module."""
    return {one.module: int(one.name.partition(".")[0]) for one in linears}


def fit(adapter: Peft, ports: LoraPorts, base_sha256: str) -> dict[str, Matrix]:
    """name of an input -> A (inputs, rank) or B (rank, outputs), scaled; layers that are not adapted are left out.

    base_sha256: hash of the bundle's checkpoint, compared where the adapter names one. Raises AdapterMismatchError.
    """
    check_base(adapter, base_sha256)
    check_targets(adapter, modules(ports.linears), layers(ports.linears))
    if adapter.rank > ports.rank:
        raise AdapterMismatchError(
            f"{adapter.path} has rank {adapter.rank}, but the bundle takes ranks up to {ports.rank}. Export the model "
            f"again with --adapter-rank {adapter.rank}."
        )
    arrays: dict[str, Matrix] = {}
    by_module = ports.modules
    for module, pair in adapter.pairs.items():
        scaled = pair.b.T * np.float32(pair.scale)
        for linear in by_module[module]:
            columns = np.concatenate([np.arange(first, first + count) for first, count in linear.runs])
            a, b = linear.ports
            arrays[a], arrays[b] = np.ascontiguousarray(pair.a.T), np.ascontiguousarray(scaled[:, columns])
    return arrays


def check_base(adapter: Peft, base_sha256: str) -> None:
    """Raise AdapterMismatchError where the adapter names another checkpoint by its hash."""
    named = adapter.config.base_sha256
    if named is not None and named != base_sha256:
        raise AdapterMismatchError(
            f"{adapter.path} was trained on the checkpoint {named[:12]}, the bundle is made of {base_sha256[:12]}. Use "
            "the bundle of that checkpoint, or export it."
        )


def deltas(adapter: Peft) -> Mapping[str, Matrix]:
    """module -> what its weight (outputs, inputs) gains where the adapter is merged."""
    return {module: (pair.b @ pair.a) * np.float32(pair.scale) for module, pair in adapter.pairs.items()}
