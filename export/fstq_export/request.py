"""What an export is asked for, checked as far as it can be without the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fstq_export import decoder
from fstq_export.adapters import Wanted
from fstq_export.recipe import Recipe
from fstq_export.wanted import Precision
from fstq_infer.errors import OptionError


@dataclass(frozen=True, slots=True)
class Request:
    """What to export. calib: calibration file; of it at most calib_items prompts of at most max_prompt tokens.

    dtype: of computation, and of weights that precision gives no format.
    """

    model: str
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    calib: Path | None = None
    calib_items: int | None = None
    max_prompt: int | None = None
    dtype: str = "float32"
    overwrite: bool = False
    revision: str | None = None
    precision: Precision = field(default_factory=Precision)
    adapters: Wanted = field(default_factory=lambda: Wanted({}))

    def __post_init__(self) -> None:
        if self.dtype not in decoder.DTYPES:
            raise OptionError(f"dtype is '{self.dtype}'; expected one of {', '.join(decoder.DTYPES)}")
        if self.calib_items is not None and self.calib_items < 1:
            raise OptionError(f"calib-items is {self.calib_items}; expected a number of items above 0")
        if self.max_prompt is not None and self.max_prompt < 1:
            raise OptionError(f"max-prompt is {self.max_prompt}; expected a number of tokens above 0")
        plan = self.precision.plan
        if self.dtype == "float16" and "fp32" in (self.precision.format, *(plan.formats.values() if plan else ())):
            raise OptionError("weights in fp32 have no place in a float16 graph; take fp16, or --dtype float32")
