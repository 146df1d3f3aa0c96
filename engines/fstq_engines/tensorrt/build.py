"""Bundle -> engine, by JetPack's ``tensorrt`` or ``tensorrt_rtx``: lowered, checked, built, compared, cached."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fstq_engines import cache, parity
from fstq_engines.cache import SIDECAR, Identity, Sidecar
from fstq_engines.external import check_external_data
from fstq_engines.tensorrt import gpu, memory, module
from fstq_engines.tensorrt.capabilities import PLAIN, RTX, Capabilities, capabilities
from fstq_engines.tensorrt.settings import Settings, default_settings
from fstq_infer.adapters import tensors
from fstq_infer.atomic import atomic_directory, sha256_file
from fstq_infer.bundle import Bundle, FileEntry
from fstq_infer.errors import BundleError, EngineError, MissingExtraError, OptionError, ParityError
from fstq_infer.machine import available_memory, give_back_memory, peak_rss
from fstq_infer.runtime.trt import PLAN
from fstq_infer.runtime.trt_adapters import PROBES

MODEL, WEIGHTS, LOWERED = "model.onnx", "model.onnx.data", "lowered"
# TensorRT-RTX 1.7.1 fails on some pruned graphs whose profiles have one row only ("CHECK(is_const()) failed").
LEAST_BATCH = {RTX: 2}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be built: where from, with what, for which GPU, with which settings. workspace: bytes, or None.

    row_version: of the TensorRT that the graph is lowered for, where it is not the one that builds.
    """

    bundle: Bundle
    trt: module.TensorRT
    gpu: gpu.Gpu
    build_sm: int | None
    settings: Settings
    target: str | None
    workspace: int | None
    row_version: str | None = None

    @property
    def capable(self) -> Capabilities:
        """What the graph may hold."""
        if self.row_version is not None:
            return capabilities(PLAIN, self.row_version, self.gpu.sm)
        return self.trt.capabilities(self.gpu.sm)

    @property
    def arguments(self) -> str:
        """Those of ``fstq build`` that make this engine again."""
        backend = next(name for name, product in module.BACKENDS.items() if product == self.trt.product)
        s = self.settings
        words = [f"--backend {backend}", f"--context {s.context}", f"--prompt {s.prompt}", f"--batch {s.batch}"]
        words += [f"--dtype {s.dtype}", f"--rank {s.rank}"]
        words += [f"--target {self.target}"] * bool(self.target)
        words += [f"--workspace {self.workspace >> 20}"] if self.workspace else []
        return " ".join(words)

    @property
    def identity(self) -> Identity:
        """What the engine depends on."""
        backend, version = self.trt.product, self.trt.version
        return Identity(self.bundle.model_sha256, backend, version, self.gpu.identity, self.arguments)


def plan(bundle: Bundle, backend: str, options: Mapping[str, Any] | None = None, found: gpu.Gpu | None = None) -> Plan:
    """Options: those of Settings, and ``target`` (a device's name), ``workspace`` (MiB). found: default: this GPU.

    Raises EngineError where TensorRT is missing, or neither a GPU nor a target is there to build for.
    """
    given = dict(options or {})
    target, workspace = given.pop("target", None), given.pop("workspace", None)
    trt = module.find(backend)
    lora = bundle.manifest.lora
    if lora is not None and given.get("rank") is None:
        given["rank"] = lora.rank
    if workspace is not None and workspace < 1:
        raise OptionError(f"workspace is {workspace}; expected MiB above 0, such as 512")
    settings = default_settings(bundle.manifest.model.max_positions, **given)
    here = found or gpu.this_gpu()
    build_sm = None
    if target is not None:
        sm, stand_in = module.target(target)
        if trt.product == PLAIN:
            if here is not None and here.sm != sm:
                raise EngineError(
                    f"tensorrt builds for the GPU it runs on, SM {here.sm} ({here.name}), not for {target} (SM {sm}). "
                    f"Build there, or check the bundle here with: fstq lint {bundle.path} --target {target}"
                )
        else:
            build_sm = stand_in
            if here is None or here.sm != build_sm:
                here = gpu.Gpu(target, sm, "of the device", elsewhere=True)
    if here is None:
        raise EngineError(
            f"there is no GPU here that cuda-python can use, and TensorRT builds for the GPU it runs on. Build on the "
            f"device, or check the bundle here with: fstq lint {bundle.path} --target orin-nano"
        )
    return Plan(bundle, trt, here, build_sm, settings, target, workspace << 20 if workspace else None)


def build(
    bundle: Bundle,
    *,
    backend: str,
    directory: Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Build an engine, or reuse a whole one that is there; returns its directory.

    Without options and directory the engine that was built last for this bundle, here, will do, whatever its settings.
    threads: of the bundle's own graph, which the engine is compared with. options: see :func:`plan`.
    Raises EngineMismatchError when ``directory`` holds an engine for something else, ParityError, EngineError.
    """
    made = plan(bundle, backend, options)
    if made.trt.product == RTX and made.target is not None and len(set(module.target(made.target))) > 1:
        raise EngineError(
            f"TensorRT-RTX does not build for {made.target} (SM {module.target(made.target)[0]}). Build there with "
            f"--backend tensorrt, or check the bundle here with: fstq lint {bundle.path} --target {made.target}"
        )
    wanted = made.identity
    if not (options or directory or force) and (last := _last_built(wanted)) is not None:
        return last
    target = cache.default_directory(wanted) if directory is None else Path(directory)
    with cache.one_builder(target):
        if not force and os.path.exists(target / SIDECAR):
            try:
                sidecar = Sidecar.read(target)
                sidecar.verify(target)
            except EngineError as error:
                _log.warning("%s The engine is built again.", error)
            else:
                sidecar.require(wanted, target, bundle)
                return target
        if directory is None and target.is_dir() and not os.path.exists(target / SIDECAR):
            shutil.rmtree(target)  # the cache is ours; another directory without a sidecar is not touched
        _build(made, target, threads, progress or _log.info)
    return target


def _last_built(wanted: Identity) -> Path | None:
    """The newest whole engine in the cache that differs in its arguments at most."""
    found = []
    for path in cache.engines_root().glob(f"*/{SIDECAR}"):
        try:
            sidecar = Sidecar.read(path.parent)
            if replace(sidecar.identity, arguments=wanted.arguments) == wanted:
                sidecar.verify(path.parent)
                found.append((path.stat().st_mtime_ns, path.parent))
        except (EngineError, OSError):
            continue
    return max(found)[1] if found else None


def build_tensorrt(bundle: Bundle, **arguments: Any) -> Path:
    """:func:`build` with JetPack's ``tensorrt``."""
    return build(bundle, backend="tensorrt", **arguments)


def build_rtx(bundle: Bundle, **arguments: Any) -> Path:
    """:func:`build` with ``tensorrt_rtx``."""
    return build(bundle, backend="tensorrt-rtx", **arguments)


def _build(made: Plan, target: Path, threads: int | None, say: Any) -> None:
    started, bundle = time.monotonic(), made.bundle
    say(f"checking the bundle {bundle.path}")
    if Bundle.open(bundle.path).model_sha256 != made.identity.bundle_sha256:
        raise EngineError(f"{bundle.path} has changed since it was opened. Wait until it is written, and try again.")
    size = sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith(MODEL))
    cache.require_disk(target, 2 * size + (64 << 20))
    try:
        with atomic_directory(target, overwrite=True, marker=SIDECAR) as partial:
            details = compile_into(made, partial, say)
            seconds = round(time.monotonic() - started, 3)
            files = {p.name: FileEntry(p.stat().st_size, sha256_file(p)) for p in sorted(partial.iterdir())}
            checked = _compare(made, partial, threads, say)
            sidecar = Sidecar(made.identity, str(bundle.path.absolute()), files, seconds, peak_rss(), checked, details)
            (partial / SIDECAR).write_text(sidecar.to_json(), encoding="utf-8")
    except BundleError as error:  # of atomic_directory, whose messages speak for themselves
        raise EngineError(str(error)) from error
    say(f"built {target} in {sidecar.build_seconds:.1f} s")


def compile_into(made: Plan, partial: Path, say: Any) -> dict[str, Any]:
    """Lower, check and build into ``partial``/PLAN; returns what the sidecar adds. Raises EngineError."""
    try:
        import onnx_ir as ir

        from fstq_engines.tensorrt import lowering, parse, settings, traps
    except ModuleNotFoundError as error:
        raise MissingExtraError("Building an engine", error.name or "onnx_ir", "ort") from error
    bundle, info, asked = made.bundle, made.bundle.manifest.model, made.settings
    stages = bundle.manifest.stages
    check_external_data(bundle.file(MODEL), [name for name in (WEIGHTS,) if name in bundle.manifest.files])
    capable = made.capable
    say("lowering the graph")
    try:
        model = ir.load(bundle.file(MODEL))
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise EngineError(f"{bundle.file(MODEL)} cannot be read: {error}. Fetch an undamaged copy.") from error
    probes = [value.name or "" for value in lowering.replaceable(model)]
    model = lowering.lower(model, capable, [s.layer for s in stages], info.dtype, asked.dtype, asked.context)
    if defaults := lowering.free(model, probes):
        (partial / PROBES).write_bytes(tensors.encode(defaults))
    least = LEAST_BATCH.get(made.trt.product, 1)
    ranges = settings.profiles(asked, stages, capable, bundle.manifest.lora is not None, least)
    traps.check_graph(model, capable, ranges)
    expected = memory.require(model, info, asked, available_memory(), least)
    folder = partial / LOWERED
    try:
        folder.mkdir()
        ir.save(model, folder / MODEL, external_data=WEIGHTS)
    except OSError as error:
        raise EngineError(f"{folder} cannot be written: {error}. Free some space, and build again.") from error
    graph_sha256 = sha256_file(folder / MODEL)
    for value in model.graph.initializers.values():
        value.const_value = None  # on disk now; the builder has its own copy
    gc.collect()
    give_back_memory()
    name = f"timing-{made.trt.version}-sm{made.gpu.sm}.cache"
    timing = cache.engines_root().parent / "timing" / name if made.trt.product == PLAIN else None
    job = parse.Job(folder / MODEL, model, ranges, made.build_sm, made.workspace, timing)
    parse.compile_plan(made.trt, job, partial / PLAN, say)
    shutil.rmtree(folder)
    return {
        "tensorrt": made.trt.version,
        "cuda": made.gpu.cuda,
        "sm": made.gpu.sm,
        "built_for_sm": made.build_sm or made.gpu.sm,
        "graph_sha256": graph_sha256,
        "row": capable.name,
        "settings": asked.as_dict(),
        "profiles": ranges,
        "expected_bytes": asdict(expected),
    }


def _compare(made: Plan, partial: Path, threads: int | None, say: Any) -> dict[str, Any]:
    """Parity with the bundle's own graph in ONNX Runtime, where the engine runs here and ONNX Runtime is installed."""
    if made.gpu.elsewhere:
        return {"checked": False, "why": f"built for {made.target} on another machine"}
    from fstq_infer.runtime.ort import OrtEngine
    from fstq_infer.runtime.trt import TrtEngine

    info = made.bundle.manifest.model
    cases, lora = parity.cases(info, made.bundle.manifest.stages), made.bundle.manifest.lora
    if lora is not None and made.settings.rank >= min(parity.RANK, lora.rank):
        cases += parity.adapted(cases, lora, info.dtype)
    fitting = [case for case in cases if len(case.rows) <= made.settings.batch]
    try:
        expected = parity.run(OrtEngine(made.bundle.path, made.bundle, threads=threads), fitting)
    except MissingExtraError as error:
        return {"checked": False, "why": str(error)}
    gc.collect()
    say("comparing the engine with the bundle")
    found = parity.run(TrtEngine(partial, made.bundle, module=made.trt.module), fitting)
    dtype = made.settings.dtype if made.settings.dtype != "float32" else info.dtype
    return {"checked": True, **asdict(agreement(fitting, expected, found, dtype))}


def agreement(
    cases: Sequence[parity.Case], expected: Sequence[parity.Output], found: Sequence[parity.Output], dtype: str
) -> parity.Parity:
    """Raises ParityError. Dense runs must agree as ``dtype`` allows; pruned ones too, where they keep the same tokens.

    In half precision two scores that are nearly equal may change places; cases where none do must agree in any case.
    """
    dense = [index for index, case in enumerate(cases) if case.name.startswith("dense")]
    parity.compare([cases[i] for i in dense], [expected[i] for i in dense], [found[i] for i in dense], dtype)
    try:
        return parity.compare(cases, expected, found, dtype)
    except ParityError:
        if dtype == "float32":
            raise
        return parity.compare_rounded(cases, expected, expected, found, dtype, "half precision")
