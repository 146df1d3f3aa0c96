"""Versions for a bug report: of this toolkit, of Python and the system, and of libraries, none of which is imported."""

from __future__ import annotations

import platform
from importlib import metadata

from fstq_infer import __version__

LIBRARIES = (
    *("numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"),
    *("torch", "transformers", "onnx", "onnx-ir", "mobius-onnx", "flwr", "peft"),
)


def installed() -> dict[str, str]:
    """Versions of the libraries that the toolkit may use and that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def lines() -> list[str]:
    """What ``fstq --version`` prints."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}"
    return [
        f"fstq-infer {__version__}",
        system,
        ", ".join(f"{name} {version}" for name, version in installed().items()),
    ]
