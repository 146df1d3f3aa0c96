"""Bundle -> ONNX Runtime engine: the graph optimised once on this machine, checked against the bundle, and cached.

Measured with onnxruntime 1.32 on 2 x86-64 cores and a float32 decoder of 202 MB: loading takes 0.23 s from the bundle
and 0.20 s from the engine (files in memory; 0.29 and 0.25 s from disk). Storing prepacked weights as well
(session.save_external_prepacked_constant_initializers) works with mapped files: 0.18 s, 34 instead of 217 MB of memory
that cannot be dropped, decoding 5 % faster. But the engine takes twice the disk (404 MB) and 0.30 s from disk, and a
first start from an SD card is what a device sees most: they are not stored.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fstq_engines import cache, lower, parity
from fstq_engines.cache import SIDECAR, Identity, Sidecar
from fstq_engines.external import check_external_data
from fstq_engines.lower import WEIGHTS
from fstq_infer.atomic import atomic_directory, sha256_file
from fstq_infer.bundle import Bundle, FileEntry
from fstq_infer.errors import BundleError, EngineError
from fstq_infer.machine import peak_rss
from fstq_infer.runtime.ort import ADAPTED, MODEL, OrtEngine, brief, import_onnxruntime, session_options

BACKEND, LOWERED, LOWERED_PART = "onnxruntime", "lowered", "part"
INLINE_BYTES = 1024  # smaller initializers stay in the graph
BUILD_MEMORY, BUILD_DISK = 256 << 20, 64 << 20  # besides what lowering says that the weights need
Progress = Callable[[str], None]
_log = logging.getLogger(__name__)


def build(
    bundle: Bundle,
    *,
    directory: Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    checksums: bool = False,
) -> Path:
    """Build an engine, or reuse a whole one that is there; returns its directory.

    directory: the engine's own; default: one in the cache, see ``fstq_engines.cache``. force: build in any case.
    threads: for building. progress: told each step; default: the log. checksums: of an engine that is there, check not
    only the sizes of its files but also their content. A damaged engine is built again.

    Raises EngineMismatchError when ``directory`` holds an engine for something else, ParityError when the new engine
    computes something else than the bundle, EngineError for lack of memory or disk, BundleError for a bad bundle.
    """
    wanted = identity(bundle)
    target = cache.default_directory(wanted) if directory is None else Path(directory)
    with cache.one_builder(target):
        if not force and _is_usable(target, wanted, bundle, checksums):
            return target
        if directory is None and target.is_dir() and not os.path.exists(target / SIDECAR):
            _log.warning("%s has lost its %s; the engine is built again", target, SIDECAR)
            shutil.rmtree(target)  # the cache is ours; another directory without a sidecar is not touched
        _build(bundle, wanted, target, threads, progress or _log.info)
    return target


def identity(bundle: Bundle) -> Identity:
    """What an engine for this bundle, built here and now, would depend on."""
    return Identity(bundle.model_sha256, BACKEND, import_onnxruntime().__version__, cache.this_cpu())


def _is_usable(target: Path, wanted: Identity, bundle: Bundle, checksums: bool) -> bool:
    if not os.path.exists(target / SIDECAR):
        return False
    try:
        sidecar = Sidecar.read(target)
        sidecar.verify(target, checksums)
    except EngineError as error:
        _log.warning("%s The engine is built again.", error)
        return False
    sidecar.require(wanted, target, bundle)
    return True


def _build(bundle: Bundle, wanted: Identity, target: Path, threads: int | None, say: Progress) -> None:
    started = time.monotonic()
    say(f"checking the bundle {bundle.path}")
    if Bundle.open(bundle.path).model_sha256 != wanted.bundle_sha256:
        raise EngineError(f"{bundle.path} has changed since it was opened. Wait until it is written, and try again.")
    files = [name for name in (MODEL, WEIGHTS) if name in bundle.manifest.files]
    check_external_data(bundle.file(MODEL), files[1:])
    parts = [_Part(bundle, name, threads) for name in graphs_of(bundle)]
    cache.require_memory(max(part.lowering.memory for part in parts) + BUILD_MEMORY)
    # One graph at a time takes all that lowering says; of those before stays what is optimised, half of that.
    disk = max(part.lowering.disk for part in parts) * (1 + len(parts)) // 2
    cache.require_disk(target, disk + BUILD_DISK)
    say("running the bundle's own graph")
    for part in parts:
        part.expected = part.outputs(bundle.path)
    try:
        with atomic_directory(target, overwrite=True, marker=SIDECAR) as partial:
            for part in parts:
                part.lower(partial, say)
            if len(parts) > 1:
                from fstq_engines.lora import share_weights

                share_weights(partial, *(part.name for part in parts))
            say("comparing the engine with the bundle")
            found = {part.name: part.compared(partial) for part in parts}
            sidecar = Sidecar(
                identity=wanted,
                bundle_path=str(bundle.path.absolute()),
                files={p.name: FileEntry(p.stat().st_size, sha256_file(p)) for p in sorted(partial.iterdir())},
                build_seconds=round(time.monotonic() - started, 3),
                peak_rss_bytes=peak_rss(),
                parity=found[MODEL] | ({"adapted": found[ADAPTED]} if ADAPTED in found else {}),
            )
            (partial / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
    except BundleError as error:  # of atomic_directory, whose messages speak for themselves
        raise EngineError(str(error)) from error
    except OSError as error:
        raise EngineError(
            f"{target} cannot be written: {error}. Is the disk full? Free space and try again."
        ) from error
    say(f"built {target} in {sidecar.build_seconds:.1f} s")


def graphs_of(bundle: Bundle) -> tuple[str, ...]:
    """The graphs that an engine for this bundle has."""
    return (MODEL,) if bundle.manifest.lora is None else (MODEL, ADAPTED)


class _Part:
    """One of an engine's graphs: lowered, optimised, and compared with the bundle's own, with an adapter if it can."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        manifest = bundle.manifest
        self.bundle, self.name, self.threads = bundle, name, threads
        self.lowering = lower.Lowering(bundle, name)
        self.made = parity.cases(manifest.model, manifest.stages)
        if name == ADAPTED and manifest.lora is not None:
            self.made = parity.adapted(self.made, manifest.lora, manifest.model.dtype)
        self.expected: list[parity.Output] = []
        self.written: list[parity.Output] = []
        self.checks: dict[str, Any] = {}

    def outputs(self, directory: Path, name: str = MODEL, sparing: bool = True) -> list[parity.Output]:
        """One session at a time: each is gone before the next is opened. sparing: of what is no engine yet."""
        gc.collect()
        engine = OrtEngine(directory, self.bundle, threads=self.threads, model=name, sparing=sparing)
        try:
            return parity.run(engine, self.made)
        finally:
            del engine
            gc.collect()  # an engine and its caches are a cycle

    def lower(self, out: Path, say: Progress) -> None:
        """Write the graph and its weights lowered and optimised into ``out``, and check what can be checked closely."""
        lowering = self.lowering
        what = "the graph with adapters" if self.name == ADAPTED else "the graph"
        say(f"lowering {what}")
        lowering.write(out / LOWERED)
        self.checks = {"layers": lowering.checked}
        if lowering.rounding:
            # The whole engine cannot be compared closely; its parts can.
            if lowering.in_place:
                say("checking caches in place")
                with lowering.temporary(out / LOWERED_PART, "in place") as part:
                    found = parity.compare(self.made, self.expected, self.outputs(part, self.name), self._dtype)
                    self.checks["in_place"] = asdict(found)
            say("measuring what rounding inputs does")
            with lowering.temporary(out / LOWERED_PART, "rounded") as part:
                self.written = self.outputs(part, self.name)
        say(f"optimising {what}")
        self._optimise(out)

    def compared(self, out: Path) -> dict[str, Any]:
        """For the sidecar. Raises ParityError where the graph computes something else than the bundle's."""
        found = self.outputs(out, self.name, sparing=False)
        result = (
            parity.compare_rounded(self.made, self.expected, self.written, found, self._dtype)
            if self.lowering.rounding
            else parity.compare(self.made, self.expected, found, self._dtype)
        )
        return asdict(result) | self.checks

    @property
    def _dtype(self) -> str:
        return self.bundle.manifest.model.dtype

    def _optimise(self, out: Path) -> None:
        ort, options = import_onnxruntime(), session_options(self.threads)
        gc.collect()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(out / self.name)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{self.name}.data")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE_BYTES)
        )
        try:
            lowered = str(out / LOWERED / self.name)
            ort.InferenceSession(lowered, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot optimise {self.bundle.file(MODEL)}: {brief(error)}"
            ) from error
        shutil.rmtree(out / LOWERED)
