"""TensorRT by its module's name: JetPack's ``tensorrt`` or ``tensorrt_rtx``, which share an API. Knows no graph."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from fstq_engines.tensorrt.capabilities import PLAIN, RTX, Capabilities, capabilities
from fstq_infer.errors import EngineError, OptionError, suggestion

BACKENDS = {"tensorrt": PLAIN, "tensorrt-rtx": RTX}
HOW = {
    PLAIN: "It comes with JetPack: make the virtual environment with --system-site-packages (python3 -m venv "
    "--system-site-packages .venv), or see 'fstq doctor'",
    RTX: "Install it with: pip install 'fstq-infer[tensorrt-rtx]'",
}
# A device -> the SM it has, and the SM that TensorRT-RTX builds for in its stead.
TARGETS = {
    "orin-nano": (87, 86),
    "orin-nx": (87, 86),
    "agx-orin": (87, 86),
    "thor": (110, 120),
    "sm86": (86, 86),
    "sm120": (120, 120),
}


@dataclass(frozen=True, slots=True)
class TensorRT:
    """The module, its name and its version."""

    module: Any
    product: str
    version: str

    def capabilities(self, sm: int) -> Capabilities:
        """What it takes on a GPU of that architecture."""
        return capabilities(self.product, self.version, sm)


def find(backend: str) -> TensorRT:
    """The module behind a backend's name. Raises EngineError where it is missing or does not load."""
    name = BACKENDS[backend]
    try:
        module = importlib.import_module(name)
        version = str(module.__version__)
    except ModuleNotFoundError as error:
        if error.name not in (name, f"{name}_bindings", f"{name}_libs"):
            raise EngineError(f"{name} does not load: {error}. {HOW[name]}.") from error
        raise EngineError(
            f"--backend {backend} needs the Python module {name!r}, which is missing. {HOW[name]}."
        ) from error
    except (ImportError, OSError, AttributeError) as error:
        raise EngineError(f"{name} is installed but does not load: {error}. {HOW[name]}.") from error
    return TensorRT(module, name, version)


def target(name: str) -> tuple[int, int]:
    """(SM, SM to build for) of a device's name. Raises OptionError with a suggestion."""
    if name not in TARGETS:
        raise OptionError(f"there is no target {name!a}; {suggestion(name, TARGETS, 'the targets are')}")
    return TARGETS[name]
