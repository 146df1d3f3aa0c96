"""What an engine is built for: lengths, rows, type of numbers; the two optimization profiles that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from fstq_engines.tensorrt.capabilities import Capabilities
from fstq_engines.tensorrt.lowering import DTYPES
from fstq_infer.errors import EngineError, OptionError, suggestion
from fstq_infer.runtime.engine import Stage

USUAL_CONTEXT = 4096
Range = tuple[int, int, int]  # smallest, most usual, largest


@dataclass(frozen=True, slots=True)
class Settings:
    """context: tokens of prompt and answer. prompt: tokens of one call. batch: rows. rank: of a LoRA adapter.

    keep: share of a prompt that is usually left after the last stage; profiles are tuned for it. dtype: of layers.
    """

    context: int
    prompt: int
    batch: int = 1
    dtype: str = "float16"
    keep: float = 0.25
    rank: int = 64

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"there is no type {self.dtype!a}; {suggestion(self.dtype, DTYPES)}")
        for name in ("context", "prompt", "batch", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}, expected a whole number of at least 1")
        if self.prompt > self.context:
            raise OptionError(f"a prompt of {self.prompt} tokens is longer than the context of {self.context}")

    def as_dict(self) -> dict[str, int | float | str]:
        """For a sidecar."""
        return {name: getattr(self, name) for name in ("context", "prompt", "batch", "dtype", "keep", "rank")}


def default_settings(max_positions: int, **given: int | float | str | None) -> Settings:
    """Settings where what is not given is usual: 4,096 tokens of context, all of them as prompt, float16."""
    known = {name: value for name, value in given.items() if value is not None}
    known.setdefault("context", min(USUAL_CONTEXT, max_positions))
    known.setdefault("prompt", known["context"])
    made = Settings(**known)  # type: ignore[arg-type]
    if made.context > max_positions:
        raise OptionError(
            f"a context of {made.context} tokens is asked for, but the model has {max_positions} positions"
        )
    return made


def profiles(
    settings: Settings, stages: Sequence[Stage], capable: Capabilities, adapters: bool = False, least: int = 1
) -> list[dict[str, Range]]:
    """Ranges of each named dimension, for prefill and for decoding. A call of one token is both.

    adapters: whether there are inputs for them: one for all rows or one for each, of rank 0 (none) and above.
    least: rows that the profiles allow in any case.
    """
    batch = max(least, settings.batch)
    top = settings.context
    usual = max(1, settings.prompt // 2)
    prefill: dict[str, Range] = {"batch": (1, 1, batch), "sequence": (1, usual, settings.prompt)}
    decode: dict[str, Range] = {"batch": (1, 1, batch), "sequence": (1, 1, 1)}
    for group in range(len(stages) + 1):
        kept = max(1, round(usual * settings.keep)) if group else usual
        if group:
            prefill[f"columns_{group}"] = (1, kept, settings.prompt)
            decode[f"columns_{group}"] = (1, 1, 1)
        past = (1, kept, top) if capable.cache_update else (0, kept, top)
        prefill[f"past_{group}"] = past if capable.cache_update else (0, 0, top)
        decode[f"past_{group}"] = past
    if adapters:
        ranks = {"adapters": (1, 1, batch), "rank": (0, max(1, settings.rank // 4), settings.rank)}
        prefill, decode = prefill | ranks, decode | ranks
    return [prefill, decode]


def shapes(value: ir.Value, profile: Mapping[str, Range]) -> tuple[list[int], list[int], list[int]] | None:
    """Smallest, usual and largest shape of an input, None where it has no dynamic dimension.

    Raises EngineError for a dimension without a range.
    """
    dims = list(value.shape.dims) if value.shape is not None else []
    if all(isinstance(d, int) for d in dims):
        return None
    found: list[Range] = []
    for dim in dims:
        name = dim if isinstance(dim, int) else str(dim)
        if isinstance(name, int):
            found.append((name, name, name))
        elif name in profile:
            found.append(profile[name])
        else:
            raise EngineError(
                f"input {value.name} has the dimension {name!a}, whose range is not known; expected one of "
                f"{', '.join(profile)}. Export the bundle again."
            )
    low, usual, high = (list(part) for part in zip(*found, strict=True))
    return low, usual, high
