"""From a bundle to a loaded engine, by a backend's name. Knows where the parts are; imports them when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fstq_infer.bundle import Bundle
from fstq_infer.errors import OptionError, suggestion
from fstq_infer.lazy import load
from fstq_infer.machine import check_threads
from fstq_infer.runtime.engine import Engine

# name -> (builder of an engine directory, class that loads it, extra that installs the backend)
BACKENDS = {
    "ort": ("fstq_engines.ort:build", "fstq_infer.runtime.ort:OrtEngine", "ort"),
    "tensorrt": ("fstq_engines.tensorrt.build:build_tensorrt", "fstq_infer.runtime.trt:TrtEngine", "tensorrt"),
    "tensorrt-rtx": ("fstq_engines.tensorrt.build:build_rtx", "fstq_infer.runtime.trt:TrtEngine", "tensorrt-rtx"),
}


def build_engine(
    bundle: Bundle,
    backend: str = "ort",
    directory: Path | None = None,
    threads: int | None = None,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The bundle's engine directory, built and checked where there is none yet, which can take minutes.

    directory: the engine's own; default: one in the user's cache. options: those of TensorRT, such as ``context``.
    progress: told each step. Raises OptionError for an unknown backend, and what
    the backend's builder raises.
    """
    builder, _, extra = _parts(backend)
    check_threads(threads)
    build = load(builder, f"backend {backend!r}", extra)
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if given and backend == "ort":
        raise OptionError(f"{min(given)!a} is an option of the backends tensorrt and tensorrt-rtx, not of ort")
    arguments: dict[str, Any] = {"options": given} if backend != "ort" else {}
    built: Path = build(bundle, directory=directory, threads=threads, force=force, progress=progress, **arguments)
    return built


def open_engine(
    bundle: Bundle,
    backend: str = "ort",
    directory: Path | None = None,
    threads: int | None = None,
    provider: str = "cpu",
) -> Engine:
    """Load the bundle's engine, after :func:`build_engine`. Raises also what the backend's class raises.

    On another provider than the CPU the bundle's own graph runs: engines are lowered for CPU kernels.
    """
    _, loader, extra = _parts(backend)
    own = provider == "cpu" or backend != "ort"
    path = build_engine(bundle, backend, directory, threads) if own else bundle.path
    engine: Engine = load(loader, f"backend {backend!r}", extra)(path, bundle, threads=threads, provider=provider)
    return engine


def _parts(backend: str) -> tuple[str, str, str]:
    if backend not in BACKENDS:
        raise OptionError(f"there is no backend {backend!r}; {suggestion(backend, BACKENDS, 'the backends are')}")
    return BACKENDS[backend]
