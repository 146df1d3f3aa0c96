"""TensorRT's parser and builder, as driven here: messages kept, progress told, Ctrl-C obeyed. Knows no bundle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from fstq_engines.tensorrt.module import TensorRT
from fstq_engines.tensorrt.settings import Range, shapes
from fstq_engines.tensorrt.traps import check_messages
from fstq_infer.errors import EngineError

Say = Callable[[str], None]
WAIT = 0.2  # seconds between two looks for Ctrl-C


@dataclass(slots=True)
class Messages:
    """What TensorRT said: errors and warnings, in order."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


_loggers: dict[str, Any] = {}


def _logger(trt: TensorRT, messages: Messages) -> Any:
    """TensorRT keeps the first logger of a process for ever: there is one, told where messages go now."""
    module = trt.module

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages = Messages()

        def log(self, severity: Any, text: str) -> None:
            if severity <= module.ILogger.ERROR:
                self.messages.errors.append(text)
            elif severity == module.ILogger.WARNING:
                self.messages.warnings.append(text)

    logger = _loggers.setdefault(trt.product, None) or Logger()
    _loggers[trt.product], logger.messages = logger, messages
    return logger


def _monitor(module: Any, say: Say, stop: threading.Event) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                say(f"TensorRT: {phase}")

        def step_complete(self, phase: str, step: int) -> bool:
            return not stop.is_set()

        def phase_finish(self, phase: str) -> None:
            """Nothing is told: the next phase's start says it."""

    return Monitor()


@dataclass(frozen=True, slots=True)
class Job:
    """A lowered graph on disk and what to make of it. sm: of another machine's GPU, or None for this one's.

    workspace: largest scratch memory of one layer, in bytes. timing_cache: file of measured kernels, made if absent.
    """

    graph: Path
    model: ir.Model
    profiles: list[dict[str, Range]]
    sm: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None


def compile_plan(trt: TensorRT, job: Job, out: Path, say: Say) -> None:
    """Parse the graph, build it and write the plan to ``out``. Raises EngineError with TensorRT's own reason.

    Ctrl-C ends the build at its next step and is then raised.
    """
    stop, messages = threading.Event(), Messages()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            _compile(trt, job, out, say, stop, messages)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="tensorrt-build", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(WAIT)
    except KeyboardInterrupt:
        stop.set()
        say("stopping the build")
        thread.join()
        raise
    if failed:
        raise failed[0]


def _compile(trt: TensorRT, job: Job, out: Path, say: Say, stop: threading.Event, messages: Messages) -> None:
    module = trt.module
    logger = _logger(trt, messages)
    builder = module.Builder(logger)
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = module.OnnxParser(network, logger)
    say("TensorRT: parsing the graph")
    if not parser.parse_from_file(str(job.graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors[:3])
        raise EngineError(f"{trt.product} {trt.version} refuses the graph: {told or _last(messages)}")
    check_messages(messages.warnings)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(module.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = module.IAttentionInputLayer  # layers come as their base class
            layer.attention.decomposable = True  # where there is no kernel for it
    config = _configure(trt, job, builder, network)
    config.progress_monitor = _monitor(module, say, stop)
    timing = _timing(module, job, config)
    _serialize(module, builder, network, config, out)
    if stop.is_set():
        raise KeyboardInterrupt
    if not out.is_file() or not out.stat().st_size:
        raise EngineError(f"{trt.product} {trt.version} left no engine: {_last(messages)}")
    check_messages(messages.warnings)
    if timing is not None and job.timing_cache is not None:
        from fstq_infer.atomic import replace_file

        replace_file(job.timing_cache, bytes(timing.serialize()))


def _configure(trt: TensorRT, job: Job, builder: Any, network: Any) -> Any:
    module, config = trt.module, builder.create_builder_config()
    if job.sm is not None:
        wanted = getattr(getattr(module, "ComputeCapability", None), f"SM{job.sm}", None)
        if wanted is None:
            raise EngineError(
                f"{trt.product} {trt.version} cannot build for SM {job.sm} on another machine; build on the device"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(wanted, 0)
    if job.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, job.workspace)
    inputs = {value.name: value for value in job.model.graph.inputs}
    for number, ranges in enumerate(job.profiles):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            found = shapes(inputs[name], ranges)
            if found is not None:
                profile.set_shape(name, *found)
        if config.add_optimization_profile(profile) != number:
            raise EngineError(f"TensorRT refuses optimization profile {number}: {ranges}")
    return config


def _timing(module: Any, job: Job, config: Any) -> Any:
    """A cache of kernel timings in use, or None where there is none (TensorRT-RTX times nothing)."""
    if job.timing_cache is None:
        return None
    try:
        known = job.timing_cache.read_bytes()
    except OSError:
        known = b""
    timing = config.create_timing_cache(known)
    if timing is None or not config.set_timing_cache(timing, False):
        timing = config.create_timing_cache(b"")  # of another GPU or version: measured anew
        config.set_timing_cache(timing, False)
    return timing


def _serialize(module: Any, builder: Any, network: Any, config: Any, out: Path) -> None:
    """Write the plan piece by piece where that is possible: an engine is as large as its weights.

    Raises EngineError where it cannot be written.
    """
    writer = getattr(module, "IStreamWriter", None)
    failed: list[OSError] = []
    if writer is None or not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            try:
                out.write_bytes(plan)
            except OSError as error:
                failed.append(error)
    else:
        with out.open("wb", buffering=0) as file:

            class Writer(writer):  # type: ignore[misc, valid-type]
                def __init__(self) -> None:
                    super().__init__()

                def write(self, data: Any) -> int:
                    left = memoryview(data).cast("B")
                    size = len(left)
                    try:
                        while left:
                            left = left[file.write(left) :]
                    except OSError as error:  # must not pass through TensorRT's own frames
                        failed.append(error)
                    return size - len(left)

            if not builder.build_serialized_network_to_stream(network, config, Writer()) and not failed:
                file.truncate(0)
    if failed:
        raise EngineError(f"{out} cannot be written: {failed[0]}. Free some space, and build again.") from failed[0]


def _last(messages: Messages) -> str:
    noise = ("---", "catchCudaError", "logger passed into")
    said = [m for m in messages.errors or messages.warnings if not any(part in m for part in noise)]
    return (said[-1] if said else "it gave no reason")[:500]
