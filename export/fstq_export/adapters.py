"""Adapters in an export: which layers take them, what the reference with an adapter is, and one baked into a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from fstq_export import linears
from fstq_export.source import Source
from fstq_infer.adapters import fit, peft
from fstq_infer.adapters.ports import MOST_RANK, Linear, LoraPorts
from fstq_infer.adapters.store import named
from fstq_infer.atomic import sha256_file
from fstq_infer.errors import AdapterMismatchError, OptionError, suggestion
from fstq_infer.fisher.hooks import Decoder

ALL = "all"
LEAST_RANK = 64  # where no larger adapter asks for more
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Adapters that were asked for. given: name -> folder. targets: names of modules that can be adapted, or 'all'.

    rank: the largest that fits. merge: a folder whose adapter becomes part of the model.
    """

    given: Mapping[str, Path]
    targets: tuple[str, ...] = ()
    rank: int | None = None
    merge: Path | None = None

    @classmethod
    def parse(
        cls,
        adapters: Sequence[str] = (),
        targets: str | None = None,
        rank: int | None = None,
        merge: Path | None = None,
    ) -> Wanted:
        """From the command line. Raises OptionError, AdapterNameError."""
        given: dict[str, Path] = {}
        for text in adapters:
            name, folder = named(text)
            if name.lower() in {known.lower() for known in given}:
                raise OptionError(f"two adapters are named '{name}'; give one of them another name: NAME={folder}")
            given[name] = folder
        if rank is not None and not 1 <= rank <= MOST_RANK:
            raise OptionError(f"adapter-rank is {rank}; expected a rank from 1 to {MOST_RANK}")
        listed = tuple(part.strip() for part in targets.split(",") if part.strip()) if targets else ()
        if rank is not None and not (given or listed):
            raise OptionError("adapter-rank has no meaning without --adapter or --adapter-targets")
        return cls(given, listed, rank, merge)

    @property
    def any(self) -> bool:
        """Whether the graph gets inputs for adapters."""
        return bool(self.given or self.targets)

    def read(self) -> dict[str, peft.Peft]:
        """All adapters, checked as far as they can be without the model. Raises AdapterError subclasses."""
        return {name: peft.read(folder) for name, folder in self.given.items()}

    def ports(self, source: Source, graph: ir.Graph, dtype: str, adapters: Mapping[str, peft.Peft]) -> LoraPorts:
        """The inputs that a graph gets: for the named targets, or for what the adapters adapt. Checks them all."""
        found = list(linears.find(source, graph, dtype).values())
        for adapter in adapters.values():
            fit.check_base(adapter, source.sha256)
            peft.check_targets(adapter, fit.modules(found), fit.layers(found))
        largest = max((adapter.rank for adapter in adapters.values()), default=1)
        if self.rank is not None and largest > self.rank:
            name = next(name for name, adapter in adapters.items() if adapter.rank == largest)
            raise OptionError(f"adapter '{name}' has rank {largest}, above --adapter-rank {self.rank}; raise it")
        chosen = {module for adapter in adapters.values() for module in adapter.pairs} | self._targeted(found)
        rank = self.rank or max(LEAST_RANK, largest)
        return LoraPorts(rank, tuple(one for one in found if one.module in chosen), {})

    def _targeted(self, found: Sequence[Linear]) -> set[str]:
        modules = {one.module for one in found}
        if ALL in self.targets:
            return modules
        chosen: set[str] = set()
        for target in self.targets:
            fitting = {m for m in modules if m == target or m.endswith(f".{target}")}
            if not fitting:
                names = sorted({m.rpartition(".")[2] for m in modules})
                raise OptionError(
                    f"no linear layer is named '{target}'; {suggestion(target, names, 'there are')}, or all"
                )
            chosen |= fitting
        return chosen


def adapt_in_place(decoder: Decoder, adapter: peft.Peft) -> None:
    """Give a resident model an adapter's weights for good: the reference that a graph with it is checked against."""
    modules = dict(decoder.model.named_modules())
    with torch.no_grad():
        for module, delta in fit.deltas(adapter).items():
            weight: Any = modules[module].weight
            gain = torch.from_numpy(delta)
            weight += gain.T if linears.is_turned(modules[module]) else gain


@contextmanager
def merged(source: Source, folder: Path, scratch: Path) -> Iterator[Source]:
    """The model with an adapter baked in, as a checkpoint in ``scratch`` while the context lasts.

    What is changed is stored in float32, the rest as it was. Raises AdapterError subclasses.
    """
    adapter = peft.read(folder)
    fit.check_base(adapter, source.sha256)
    keys = linears.keys_of(source)
    shapes, layers = linears.shapes_of(source)
    peft.check_targets(adapter, shapes, layers)
    missing = adapter.pairs.keys() - {module for module, _ in keys.values()}
    if missing:
        raise AdapterMismatchError(f"{source.name}: the checkpoint holds no weight of {min(missing)}; save it whole")
    deltas = fit.deltas(adapter)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        for path in source.folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                os.symlink(path.resolve(), scratch / path.name)
        for path in sorted(source.folder.glob("*.safetensors")):
            held = {}
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    held[key] = file.get_tensor(key)
                    module, turned = keys.get(key, ("", False))
                    if module in deltas:
                        gain = torch.from_numpy(deltas[module])
                        held[key] = held[key].float() + (gain.T if turned else gain)
                meta = file.metadata()
            save_file({key: tensor.contiguous() for key, tensor in held.items()}, scratch / path.name, metadata=meta)
        digest = hashlib.sha256(bytes.fromhex(source.sha256) + bytes.fromhex(sha256_file(folder / peft.WEIGHTS)))
        digest.update(json.dumps({module: pair.scale for module, pair in sorted(adapter.pairs.items())}).encode())
        yield replace(source, folder=scratch, sha256=digest.hexdigest())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def empty(ports: LoraPorts | None, dtype: str) -> dict[str, Array]:
    """Inputs ``lora.*`` that change nothing: of rank 0."""
    found: dict[str, Array] = {}
    for one in ports.linears if ports is not None else ():
        a, b = one.ports
        found |= {a: np.zeros((1, one.inputs, 0), dtype), b: np.zeros((1, 0, one.outputs), dtype)}
    return found


def inputs(adapter: peft.Peft, ports: LoraPorts, dtype: str, base_sha256: str) -> dict[str, Array]:
    """Inputs ``lora.*`` of one adapter for a whole batch."""
    fitted = fit.fit(adapter, ports, base_sha256)
    return empty(ports, dtype) | {name: array[None].astype(dtype) for name, array in fitted.items()}
