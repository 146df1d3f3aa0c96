"""How much memory an engine and its build take, before either is tried. On a Jetson CPU and GPU share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from fstq_engines.tensorrt.settings import Settings
from fstq_infer.adapters.ports import SCOPE
from fstq_infer.bundle import ModelInfo
from fstq_infer.errors import EngineError
from fstq_infer.runtime.trt_adapters import REMEMBERED

BASE = 700 << 20  # TensorRT's own libraries and kernels
COPIES = 3  # of the weights while building: as parsed, as laid out for kernels, as written
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SMALLEST = 256  # tokens; shorter contexts are not suggested


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes. weights: of the graph. caches: keys and values of all layers. scratch: activations of the longest call.

    adapters: matrices of the largest rank for each row: what one combination of adapters takes.
    """

    weights: int
    caches: int
    scratch: int
    adapters: int = 0

    @property
    def run(self) -> int:
        """While the engine runs, with as many combinations of adapters as stay on the device."""
        return self.weights + self.caches + self.scratch + REMEMBERED * self.adapters + BASE

    @property
    def build(self) -> int:
        """While it is built: kernels are timed with all buffers of a profile there."""
        return COPIES * self.weights + self.caches + self.scratch + self.adapters + BASE

    @property
    def most(self) -> int:
        """Whichever of the two takes more: an engine that cannot run is not worth building."""
        return max(self.build, self.run)


def estimate(model: ir.Model, info: ModelInfo, settings: Settings) -> Estimate:
    """For a lowered graph: sizes of initializers, and of caches as wide as the context in every layer."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    row = widest = wide = 0  # bytes of one token in all caches, in the widest; of one rank in all adapted layers
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_key_values.") and value.shape is not None and value.dtype is not None:
            heads, width = (d if isinstance(d, int) else 0 for d in (value.shape[1], value.shape[3]))
            row += int(heads * width * value.dtype.itemsize)
            widest = max(widest, int(heads * width * value.dtype.itemsize))
        elif (value.name or "").startswith(f"{SCOPE}.") and value.shape is not None and value.dtype is not None:
            wide += sum(d for d in value.shape.dims if isinstance(d, int)) * int(value.dtype.itemsize)
    size = BYTES[settings.dtype]
    # Six arrays as wide as the hidden size and two as an MLP of four times that; masks, ranks and lexical features.
    scratch = settings.batch * settings.prompt * (14 * info.hidden_size * size + 12 * settings.context)
    scratch += 4 * settings.batch * info.vocab_size
    caches = settings.context * row  # every layer may hold the whole prompt: keep is chosen at run time
    if any((value.name or "").startswith("new.") for value in model.graph.outputs):
        # New columns are returned, and copied behind the old ones; a spare buffer lays those out for more.
        caches += settings.prompt * row + settings.context * widest
    return Estimate(weights, settings.batch * caches, scratch, settings.batch * settings.rank * wide)


def require(model: ir.Model, info: ModelInfo, settings: Settings, free: int | None, least: int = 1) -> Estimate:
    """The estimate; raises EngineError where ``free`` bytes do not suffice to build and run, naming what would fit.

    least: rows that profiles allow in any case.
    """
    settings = replace(settings, batch=max(settings.batch, least))
    asked = estimate(model, info, settings)
    if free is None or asked.most <= free:
        return asked
    fits = next((s for s in _smaller(settings, least) if estimate(model, info, s).most <= free), None)
    if fits is not None:
        rank = f" --rank {fits.rank}" if asked.adapters else ""
        advice = f"This would fit: --context {fits.context} --prompt {fits.prompt} --batch {fits.batch}{rank}"
    else:
        advice = f"Weights alone need {_mib(COPIES * asked.weights + BASE)}: export with fewer bits (--precision int4)"
    adapters = f", {_mib(REMEMBERED * asked.adapters)} for {REMEMBERED} combinations of adapters" * bool(asked.adapters)
    raise EngineError(
        f"building and running needs about {_mib(asked.most)} of memory ({_mib(asked.weights)} of weights, {COPIES} "
        f"times while building, {_mib(asked.caches)} for {settings.batch} x {settings.context} cached tokens, "
        f"{_mib(asked.scratch)} of activations{adapters}), but {_mib(free)} are free. {advice}; or close other "
        "programs, or add swap."
    )


def _smaller(settings: Settings, least: int) -> Iterator[Settings]:
    """As few rows as may be and ever shorter contexts, each with the whole rank and with a quarter of it."""
    contexts = [settings.context]
    while contexts[-1] > SMALLEST:
        contexts.append(max(SMALLEST, contexts[-1] // 2))
    for context in contexts:
        for rank in (settings.rank, max(1, settings.rank // 4)):
            yield replace(settings, context=context, prompt=min(settings.prompt, context), batch=least, rank=rank)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
