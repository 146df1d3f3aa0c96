"""Who takes part in bench/inference.py, and in which set-ups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contender:
    """variants: (artefact, options) of each way that a competent user would try; the fastest is measured."""

    name: str
    runtime: str
    variants: tuple[tuple[str, dict[str, Any]], ...]
    peer: bool = True


def own(precision: str, keep: float) -> Contender:
    how = "dense" if keep == 1 else f"keep {keep:.0%}".replace("%", " %")
    return Contender(f"fstq {precision} {how}", "fstq", ((f"{precision}.bundle", {"keep": keep}),), False)


def llama(kind: str) -> Contender:
    ways = [(True, True, 512), (False, True, 512), (True, False, 512), (True, True, 2048)]
    variants = [(f"{kind}.gguf", {"flash": flash, "repack": pack, "ubatch": size}) for flash, pack, size in ways]
    return Contender(f"llama.cpp {kind}", "llama.cpp", tuple(variants))


# The first one stays loaded, so that waves of workers can be compared; those of the targets come first.
CONTENDERS = (
    own("w8", 1.0),
    own("w4+8", 1.0),
    own("w4+8", 0.25),
    own("fp32", 1.0),
    llama("Q8_0"),
    llama("Q4_0"),
    Contender("transformers bf16", "transformers", (("model", {"dtype": "bfloat16"}),)),
    Contender("onnxruntime-genai int8", "onnxruntime-genai", (("genai:int8", {}),)),
    Contender("onnxruntime-genai int4", "onnxruntime-genai", (("genai:int4-128", {}), ("genai:int4-32", {}))),
    own("w4+8", 0.5),
    own("w8", 0.25),
    own("w8h4", 1.0),
    own("w8h4", 0.25),
    own("w8", 0.5),
    own("w4", 1.0),
    own("w4", 0.25),
    own("fp32", 0.5),
    own("fp32", 0.25),
    Contender("transformers fp32", "transformers", (("model", {"dtype": "float32"}),)),
    Contender("transformers bf16 compiled", "transformers", (("model", {"dtype": "bfloat16", "compile": True}),)),
    Contender("onnxruntime-genai fp32", "onnxruntime-genai", (("genai:fp32", {}),)),
    Contender("mobius on onnxruntime", "onnxruntime", (("mobius:cpu", {}), ("mobius:onnx-standard", {}))),
)
