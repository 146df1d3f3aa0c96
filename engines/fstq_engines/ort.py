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

from fstq_engines import cache, parity
from fstq_engines.cache import SIDECAR, Identity, Sidecar
from fstq_engines.external import check_external_data
from fstq_infer.atomic import atomic_directory, sha256_file
from fstq_infer.bundle import Bundle, FileEntry
from fstq_infer.errors import BundleError, EngineError, MissingExtraError
from fstq_infer.machine import peak_rss
from fstq_infer.runtime.ort import ADAPTED, MODEL, OrtEngine, brief, import_onnxruntime, session_options

BACKEND, WEIGHTS, LOWERED = "onnxruntime", "model.onnx.data", "lowered"
INLINE_BYTES = 1024  # smaller initializers stay in the graph
BUILD_MEMORY = 256 << 20  # besides the weights twice: as they are read, and as they are written or prepacked
BUILD_DISK = 64 << 20  # besides the weights three times: narrow numbers may become wider
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
    size = sum(bundle.manifest.files[name].bytes for name in files)
    cache.require_memory(2 * size + BUILD_MEMORY)
    graphs = [MODEL] if bundle.manifest.lora is None else [MODEL, ADAPTED]
    cache.require_disk(target, (2 + len(graphs)) * size + BUILD_DISK)
    made = parity.cases(bundle.manifest.model, bundle.manifest.stages)
    # One session at a time: each is gone before the next is opened.
    say("running the bundle's own graph")
    expected = parity.run_all(OrtEngine(bundle.path, bundle, threads=threads), made, bundle.manifest)
    gc.collect()
    try:
        with atomic_directory(target, overwrite=True, marker=SIDECAR) as partial:
            say("optimising the graph")
            rounded = any([_optimise(bundle, partial, threads, name) for name in graphs])
            if len(graphs) > 1:
                _share(partial, *graphs)
            say("comparing the engine with the bundle")
            found = parity.run_all(OrtEngine(partial, bundle, threads=threads), made, bundle.manifest)
            made = made + parity.adapted_cases(made, bundle.manifest)
            result = parity.compare(made, expected, found, bundle.manifest.model.dtype, rounded)
            sidecar = Sidecar(
                identity=wanted,
                bundle_path=str(bundle.path.absolute()),
                files={p.name: FileEntry(p.stat().st_size, sha256_file(p)) for p in sorted(partial.iterdir())},
                build_seconds=round(time.monotonic() - started, 3),
                peak_rss_bytes=peak_rss(),
                parity=asdict(result),
            )
            (partial / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
    except BundleError as error:  # of atomic_directory, whose messages speak for themselves
        raise EngineError(str(error)) from error
    say(f"built {target} in {sidecar.build_seconds:.1f} s")


def _lower(bundle: Bundle, out: Path, name: str) -> bool:
    """Write the bundle's graph as this onnxruntime runs it best into ``out``, with all its weights.

    name: MODEL, without inputs for adapters, or ADAPTED. Returns whether it rounds inputs of layers.
    """
    try:
        import onnx_ir as ir

        from fstq_engines.lora import WithoutAdapters
        from fstq_engines.quantized import QuantizedLayers
        from fstq_engines.static_cache import StaticCache, probe_model
    except ModuleNotFoundError as error:
        raise MissingExtraError("Building an engine", error.name or "onnx_ir", "ort") from error
    layers = QuantizedLayers()
    passes: list[Any] = [layers] if name == ADAPTED else [WithoutAdapters(), layers]
    try:
        import_onnxruntime().InferenceSession(probe_model(), session_options(1), providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's exceptions have no common base
        _log.info("this onnxruntime has no TensorScatter: the engine will copy its cache at each call")
    else:
        passes.append(StaticCache([stage.layer for stage in bundle.manifest.stages]))
    try:
        model = ir.passes.Sequential(*passes)(ir.load(bundle.file(MODEL))).model
    except (ir.passes.PassError, ir.passes.InvariantError) as error:
        raise EngineError(
            f"{bundle.file(MODEL)} is not built as expected: {error.__cause__ or error}. Export it again."
        ) from error
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise EngineError(f"{bundle.file(MODEL)} cannot be read: {error}. Fetch an undamaged copy.") from error
    try:
        out.mkdir()
        ir.save(model, out / name, external_data=WEIGHTS)
    except OSError as error:
        raise EngineError(f"{out.parent} cannot be written: {error}. Free some space, and build again.") from error
    return layers.rounding > 0


def _share(folder: Path, model: str, other: str) -> None:
    """One file of weights for both graphs, see fstq_engines/lora.py."""
    from fstq_engines.lora import share_weights

    share_weights(folder, model, other)


def _optimise(bundle: Bundle, out: Path, threads: int | None, name: str) -> bool:
    """Write the lowered and optimised graph and its weights into ``out``; whether it rounds inputs of layers."""
    ort, options = import_onnxruntime(), session_options(threads)
    rounded = _lower(bundle, out / LOWERED, name)
    gc.collect()  # the lowered model is a cycle, and holds weights
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(out / name)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{name}.data")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(INLINE_BYTES)
    )
    try:
        ort.InferenceSession(str(out / LOWERED / name), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise EngineError(
            f"onnxruntime {ort.__version__} cannot optimise {bundle.file(MODEL)}: {brief(error)}"
        ) from error
    shutil.rmtree(out / LOWERED)
    return rounded
