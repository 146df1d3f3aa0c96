"""fstq-infer: Fisher-guided token pruning and mixed-precision engines for language models on Jetson and CPU.

>>> from fstq_infer import Generator
>>> result = Generator.load("model.bundle").generate("Once upon a time", keep=0.5)

Importing this package loads no torch, onnxruntime, transformers or flwr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fstq_infer.runtime.generate import Generator

__version__ = "0.1.0"
__all__ = ["Generator", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Generator":
        from fstq_infer.runtime.generate import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
