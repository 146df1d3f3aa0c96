"""How much memory an engine and its build take, before either is tried. On a Jetson CPU and GPU share it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from fstq_engines.tensorrt.settings import Settings
from fstq_infer.adapters.ports import SCOPE
from fstq_infer.bundle import ModelInfo
from fstq_infer.errors import EngineError

BASE = 700 << 20  # TensorRT's own libraries and kernels
COPIES = 3  # of the weights while building: as parsed, as laid out for kernels, as written
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SMALLEST = 256  # tokens; shorter contexts are not suggested


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes. weights: of the graph. caches: keys and values of all layers. scratch: activations of the longest call.

    adapters: matrices of one adapter for each row, of the largest rank.
    """

    weights: int
    caches: int
    scratch: int
    adapters: int = 0

    @property
    def run(self) -> int:
        """While the engine runs."""
        return self.weights + self.caches + self.scratch + self.adapters + BASE

    @property
    def build(self) -> int:
        """While it is built: kernels are timed with all buffers of a profile there."""
        return COPIES * self.weights + self.caches + self.scratch + self.adapters + BASE


def estimate(model: ir.Model, info: ModelInfo, settings: Settings) -> Estimate:
    """For a lowered graph: sizes of initializers, and of caches as wide as the context in every layer."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    row = wide = 0  # bytes of one token in all caches; of one rank in all adapted layers
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_key_values.") and value.shape is not None and value.dtype is not None:
            heads, width = (d if isinstance(d, int) else 0 for d in (value.shape[1], value.shape[3]))
            row += int(heads * width * value.dtype.itemsize)
        elif (value.name or "").startswith(f"{SCOPE}.") and value.shape is not None and value.dtype is not None:
            wide += sum(d for d in value.shape.dims if isinstance(d, int)) * int(value.dtype.itemsize)
    size = BYTES[settings.dtype]
    # Six arrays as wide as the hidden size and two as an MLP of four times that; masks, ranks and lexical features.
    scratch = settings.batch * settings.prompt * (14 * info.hidden_size * size + 12 * settings.context)
    scratch += 4 * settings.batch * info.vocab_size
    columns = settings.context  # every layer may hold the whole prompt: keep is chosen at run time
    if any((value.name or "").startswith("new.") for value in model.graph.outputs):
        columns += settings.prompt  # new columns are returned, and copied behind the old ones
    return Estimate(weights, settings.batch * columns * row, scratch, settings.batch * settings.rank * wide)


def require(model: ir.Model, info: ModelInfo, settings: Settings, free: int | None) -> Estimate:
    """The estimate; raises EngineError where ``free`` bytes do not suffice to build, naming what would fit."""
    asked = estimate(model, info, settings)
    if free is None or asked.build <= free:
        return asked
    context, fits = settings.context, None
    while context > SMALLEST and fits is None:
        context = max(SMALLEST, context // 2)
        smaller = replace(settings, context=context, prompt=min(settings.prompt, context), batch=1)
        if estimate(model, info, smaller).build <= free:
            fits = smaller
    advice = (
        f"This would fit: --context {fits.context} --prompt {fits.prompt} --batch {fits.batch}"
        if fits is not None
        else f"Weights alone need {_mib(COPIES * asked.weights + BASE)}: export with fewer bits (--precision int4)"
    )
    raise EngineError(
        f"building needs about {_mib(asked.build)} of memory ({_mib(asked.weights)} of weights {COPIES} times, "
        f"{_mib(asked.caches)} for {settings.batch} x {settings.context} cached tokens, {_mib(asked.scratch)} of "
        f"activations), but {_mib(free)} are free. {advice}; or close other programs, or add swap."
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
