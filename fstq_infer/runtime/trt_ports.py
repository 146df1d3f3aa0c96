"""What a TensorRT plan takes and gives, read from the plan itself. Knows graph names, no memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fstq_infer.adapters.ports import SCOPE
from fstq_infer.errors import EngineError
from fstq_infer.runtime.engine import Stage

PROBE = "fstq.probe."  # of inputs that adapters may replace
SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}
_CACHED = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True, slots=True)
class Port:
    """A cached input: (batch, heads, columns, width) of numbers of ``size`` bytes; what the plan gives back for it."""

    name: str
    out: str
    group: int
    heads: int
    width: int
    size: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """An input of adapters: shape, -1 where it is free (rows, rank); kind: of numbers, as TensorRT names it."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """What holds such numbers; NumPy has no bfloat16."""
        return np.dtype({"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16}[self.kind])


@dataclass(frozen=True, slots=True)
class Ports:
    """What a plan takes. in_place: it updates caches itself. loras, probes: inputs of adapters; rank: the largest.

    batch, prompt, context: most rows, tokens of a call, cached columns.
    """

    inputs: tuple[str, ...]
    cached: tuple[Port, ...]
    groups: int
    batch: int
    prompt: int
    context: int
    in_place: bool
    vocab: int
    loras: tuple[Matrix, ...]
    probes: tuple[Matrix, ...]
    rank: int

    @classmethod
    def of(cls, plan: Any, module: Any, stages: Sequence[Stage]) -> Ports:
        """Read from a deserialized plan. Raises EngineError where it is not one of ours."""
        names = [plan.get_tensor_name(i) for i in range(plan.num_io_tensors)]
        inputs = {name for name in names if plan.get_tensor_mode(name) == module.TensorIOMode.INPUT}
        in_place, borders = "past_rows.0" in inputs, [stage.layer for stage in stages]
        wanted = {"input_ids", "position_ids", *(f"past_positions.{g}" for g in range(len(stages) + 1))}
        if missing := sorted(wanted - inputs) or [n for n in ("logits",) if n not in names]:
            raise EngineError(f"the plan lacks {', '.join(missing)}: it was not built from a bundle. Build it again")
        cached, context = [], 0
        for name in names:
            if match := _CACHED.fullmatch(name):
                shape = tuple(plan.get_tensor_shape(name))
                out = f"{'present' if in_place else 'new'}.{match[1]}.{match[2]}"
                group = sum(int(match[1]) >= border for border in borders)
                size = SIZES[plan.get_tensor_dtype(name).name]
                cached.append(Port(name, out, group, shape[1], shape[3], size))
                context = shape[2] if in_place else plan.get_tensor_profile_shape(name, 1)[2][2]
        batch, prompt = plan.get_tensor_profile_shape("input_ids", 0)[2]
        loras, probes = (
            tuple(
                Matrix(name, tuple(plan.get_tensor_shape(name)), plan.get_tensor_dtype(name).name)
                for name in names
                if name in inputs and name.startswith(prefix)
            )
            for prefix in (f"{SCOPE}.", PROBE)
        )
        rank = max(
            (plan.get_tensor_profile_shape(one.name, 0)[2][one.shape[1:].index(-1) + 1] for one in loras), default=0
        )
        vocab = plan.get_tensor_shape("logits")[2]
        return cls(
            tuple(n for n in names if n in inputs),
            tuple(cached),
            len(stages) + 1,
            batch,
            prompt,
            context,
            in_place,
            vocab,
            loras,
            probes,
            rank,
        )
