"""Types of options that several commands share, and the readers of those that are written as lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from fstq_infer.cli import complete
from fstq_infer.errors import OptionError

T = TypeVar("T", int, float)
CALIB_HELP = (
    "Calibration data: JSON lines with prompt/answer or context/question/answer, or plain text lines. "
    "Without it nothing is known of quality, and the bundle is dense unless --prune-layer is given."
)
Bundle = Annotated[Path, typer.Argument(help="The bundle's directory.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all that this process may use.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Share of prompt tokens that stay (after the last stage, or after each: 0.5,0.25), or 'auto': as many as "
        "each prompt needs; default: the bundle's.",
        autocompletion=complete.keeps,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the bundle's.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.")]
Backend = Annotated[
    str, typer.Option(help="ort, tensorrt or tensorrt-rtx; see 'fstq build'.", autocompletion=complete.backends)
]
# Settings of a TensorRT engine.
Context = Annotated[
    int | None, typer.Option(help="TensorRT: most tokens of prompt and answer together; default: 4096, or the model's.")
]
Prompt = Annotated[int | None, typer.Option(help="TensorRT: most tokens of one call; default: the context.")]
Batch = Annotated[int | None, typer.Option(help="TensorRT: most rows; default: 1.")]
LayerType = Annotated[
    str | None, typer.Option("--dtype", help="TensorRT: float16, bfloat16 or float32; default: float16.")
]
Rank = Annotated[int | None, typer.Option(help="TensorRT: largest rank of an adapter; default: the bundle's.")]
Adapter = Annotated[
    str | None,
    typer.Option(help="Name of one of the bundle's adapters; default: none.", autocompletion=complete.adapters),
]


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(f"Example: {command}" for command in commands)


def ratios_of(text: str) -> list[float] | None:
    """--keep: numbers with commas; None for 'auto'. Raises OptionError."""
    return _listed(text, float, "--keep", "numbers, such as 0.5,0.25")


def layers_of(text: str) -> list[int] | None:
    """--prune-layer: whole numbers with commas; None for 'auto'. Raises OptionError."""
    return _listed(text, int, "--prune-layer", "whole numbers, such as 2,4")


def keep_of(text: str | None) -> float | list[float] | str | None:
    """A keep ratio, one for each stage, 'auto' or None as it was given."""
    ratios = None if text is None else ratios_of(text)
    return text if ratios is None else ratios if len(ratios) > 1 else ratios[0]


def _listed(text: str, read: Callable[[str], T], option: str, expected: str) -> list[T] | None:
    if text == "auto":
        return None
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"{option} is {text!a:.60}; expected 'auto' or {expected}") from None
