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
from fstq_infer.runtime.ort import MODEL, OrtEngine, brief, import_onnxruntime, session_options

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


def load(
    engine_dir: Path,
    bundle: Bundle,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    checksums: bool = False,
) -> OrtEngine:
    """Load a built engine. Raises EngineError where it is absent or damaged, EngineMismatchError if it is another's."""
    wanted = identity(bundle)
    try:
        sidecar = Sidecar.read(engine_dir)
        sidecar.verify(engine_dir, checksums)
    except EngineError as error:
        raise EngineError(f"{error} Rebuild it with: {cache.rebuild_command(bundle, engine_dir, wanted)}") from error
    sidecar.require(wanted, engine_dir, bundle)
    return OrtEngine(engine_dir, bundle, threads=threads, provider=provider)


def identity(bundle: Bundle) -> Identity:
    """What an engine for this bundle, built here and now, would depend on."""
    return Identity(bundle.manifest_sha256, BACKEND, import_onnxruntime().__version__, cache.this_cpu())


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
    if Bundle.open(bundle.path).manifest_sha256 != wanted.bundle_sha256:
        raise EngineError(f"{bundle.path} has changed since it was opened. Wait until it is written, and try again.")
    files = [name for name in (MODEL, WEIGHTS) if name in bundle.manifest.files]
    check_external_data(bundle.file(MODEL), files[1:])
    lowering = lower.Lowering(bundle)
    cache.require_memory(lowering.memory + BUILD_MEMORY)
    cache.require_disk(target, lowering.disk + BUILD_DISK)
    made = parity.cases(bundle.manifest.model, bundle.manifest.stages)

    def outputs(directory: Path) -> list[parity.Output]:
        """One session at a time: each is gone before the next is opened."""
        gc.collect()
        return parity.run(OrtEngine(directory, bundle, threads=threads), made)

    say("running the bundle's own graph")
    dtype, expected = bundle.manifest.model.dtype, outputs(bundle.path)
    try:
        with atomic_directory(target, overwrite=True, marker=SIDECAR) as partial:
            say("lowering the graph")
            lowering.write(partial / LOWERED)
            written: list[parity.Output] = []
            checks: dict[str, Any] = {"layers": lowering.checked}
            if lowering.rounding:
                # The whole engine cannot be compared closely; its parts can.
                if lowering.in_place:
                    say("checking caches in place")
                    with lowering.temporary(partial / LOWERED_PART, "in place") as part:
                        checks["in_place"] = asdict(parity.compare(made, expected, outputs(part), dtype))
                say("measuring what rounding inputs does")
                with lowering.temporary(partial / LOWERED_PART, "rounded") as part:
                    written = outputs(part)
            say("optimising the graph")
            _optimise(bundle, partial, threads)
            say("comparing the engine with the bundle")
            found = outputs(partial)
            result = (
                parity.compare_rounded(made, expected, written, found, dtype)
                if lowering.rounding
                else parity.compare(made, expected, found, dtype)
            )
            sidecar = Sidecar(
                identity=wanted,
                bundle_path=str(bundle.path.absolute()),
                files={p.name: FileEntry(p.stat().st_size, sha256_file(p)) for p in sorted(partial.iterdir())},
                build_seconds=round(time.monotonic() - started, 3),
                peak_rss_bytes=peak_rss(),
                parity=asdict(result) | checks,
            )
            (partial / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
    except BundleError as error:  # of atomic_directory, whose messages speak for themselves
        raise EngineError(str(error)) from error
    say(f"built {target} in {sidecar.build_seconds:.1f} s")


def _optimise(bundle: Bundle, out: Path, threads: int | None) -> None:
    """Write the lowered graph and its weights optimised into ``out``."""
    ort, options = import_onnxruntime(), session_options(threads)
    gc.collect()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(out / MODEL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE_BYTES)
    )
    try:
        ort.InferenceSession(str(out / LOWERED / MODEL), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise EngineError(
            f"onnxruntime {ort.__version__} cannot optimise {bundle.file(MODEL)}: {brief(error)}"
        ) from error
    shutil.rmtree(out / LOWERED)
