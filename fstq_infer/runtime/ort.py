"""The ONNX Runtime backend: a graph of contract 1 behind the engine protocol. Knows no cache of engines and no text.

Only ids, positions, logits and kept indices are looked at; how keys and values get from call to call is told in
:mod:`fstq_infer.runtime.ort_caches`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.adapters.store import Adapter
from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError, MissingExtraError, OptionError, suggestion
from fstq_infer.machine import check_threads, physical_cores
from fstq_infer.runtime.engine import Adapted, Engine, Int64, Stage, Step, check_call
from fstq_infer.runtime.ort_adapters import Bound, Matrices
from fstq_infer.runtime.ort_caches import (
    LENGTHS,
    SHORTLIST,
    Graph,
    ReturnedCache,
    ReturnedCaches,
    SharedCache,
    SharedCaches,
)

MODEL, ADAPTED = "model.onnx", "adapted.onnx"  # of an engine: without inputs for adapters, and with them
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
Port = tuple[tuple[str, ...], int]  # accepted types, and rank
INDICES: Port = (("tensor(int64)",), 2)
LOGITS: Port = (("tensor(float)", "tensor(float16)"), 3)
LORA = LOGITS
CACHED: Port = ((*LOGITS[0], "tensor(bfloat16)"), 4)  # NumPy has no bfloat16, but nobody looks into a cache
OWN = (LENGTHS, *SHORTLIST)  # what engines may have beside the contract's
ERRORS_ONLY = 3


class OrtEngine:
    """One session over ``directory``/model.onnx.

    The graph is run as it is on the CPU: an engine directory holds it lowered and optimised, a bundle's own directory
    does not (that is the reference an engine is compared with). On CUDA, ONNX Runtime optimises it while loading.

    An engine directory has the graph twice where adapters can be used: model.onnx lacks their inputs; adapted.onnx has
    them, reads its weights from the same file, and is loaded when the first adapter is asked for.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        bundle: Bundle,
        *,
        threads: int | None = None,
        provider: str = "cpu",
        model: str = MODEL,
        sparing: bool = False,
    ) -> None:
        """threads: within one operator; default: physical cores this process may use. provider: "cpu" or "cuda".

        sparing: run operators shortly before their readers, and give each intermediate back to the system at once, for
        a few runs of a graph that makes numbers of all its codes: memory stays near the largest table, not all of them.

        Raises MissingExtraError without onnxruntime, OptionError for an option, EngineError for a graph that cannot
        be loaded or is not of contract 1, and for CUDA where ONNX Runtime would silently use the CPU.
        """
        self._ort, self._directory, self._bundle = import_onnxruntime(), Path(directory), bundle
        self._threads, self._provider = threads, provider
        info = bundle.manifest.model
        self._stages, self._vocab, self._positions = bundle.manifest.stages, info.vocab_size, info.max_positions
        path = Path(directory, model)
        # Beside weights in few bits, which are small, kernels without rearranged weights are slow.
        packed = model != ADAPTED or "plan.toml" in bundle.manifest.files
        session = _open(self._ort, path, threads, provider, packed, sparing)
        if any(port.name == LENGTHS for port in session.get_inputs()) and provider != "cpu":
            raise EngineError(f"{path} was built for the CPU; on {provider} the bundle's own graph runs: open that.")
        given = {port.name for port in session.get_inputs()}
        lora = bundle.manifest.lora
        self._lora = lora if lora is not None and any(one.ports[0] in given for one in lora.linears) else None
        inputs, outputs = contract(info.layers, len(self._stages), self._lora)
        self._fixed = 2 + bool(self._stages)  # ids, positions and keep; matrices and the cache follow
        _check(path, session, inputs, outputs, len(self._stages), self._vocab)
        self._session, self._inputs, self._outputs = session, list(inputs), list(outputs)
        self._caches = self._make_caches(())
        self._probed: ReturnedCaches | SharedCaches | None = None
        self._adapted: OrtEngine | None = None
        self._matrices: Matrices | None = None
        if self._lora is not None:
            kind = next(port.type for port in session.get_inputs() if port.name == self._lora.linears[0].ports[0])
            self._matrices = Matrices(self._caches.graph, self._lora, kind)
        self._given: tuple[Int64, ...] = (np.empty((0, 0), np.int64),) * 3  # nobody's
        self._values: list[Any] = []
        self._joined: tuple[Sequence[Any], Sequence[Any], Sequence[Any]] = ((), (), ())
        self._first: dict[int, tuple[Int64, ...]] = {}

    def _make_caches(self, probes: Sequence[str]) -> ReturnedCaches | SharedCaches:
        """Caches of calls that also give the inputs ``probes``."""
        session, groups, stages = self._session, len(self._stages) + 1, self._stages
        names = self._inputs
        first = next(i for i, name in enumerate(names) if name.startswith("past_"))
        options = self._ort.RunOptions()
        options.log_severity_level = ERRORS_ONLY
        cpu, where = (self._ort.OrtDevice.make(name, 0)._get_c_device() for name in ("cpu", self._provider))
        graph = Graph(
            session,
            _native(self._ort),
            options,
            [*names[:first], *probes, *names[first:]],
            self._outputs,
            [(port.type, port.shape) for port in _named(session.get_inputs(), names[first:])],
            groups,
            [cpu] * groups + [where] * (len(self._outputs) - groups),
        )
        if not any(port.name == LENGTHS for port in session.get_inputs()):
            return ReturnedCaches(graph)
        borders = [0, *(stage.layer for stage in stages), self._bundle.manifest.model.layers]
        return SharedCaches(graph, np.diff(borders).tolist(), self._vocab)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The graph's pruning stages, in layer order."""
        return self._stages

    @property
    def max_positions(self) -> int:
        """Longest context in tokens, generated ones included."""
        return self._positions

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab

    def empty_cache(self, batch: int) -> ReturnedCache | SharedCache:
        """A cache without tokens for ``batch`` rows; the same object for the same number of rows."""
        return self._empty(batch, self._caches)

    def _empty(self, batch: int, caches: ReturnedCaches | SharedCaches) -> ReturnedCache | SharedCache:
        if batch < 1:
            raise EngineError(f"a cache for {batch} rows is not possible; expected at least one row")
        return caches.empty(batch)

    def adapted(self, adapters: Sequence[Adapter | None]) -> Engine:
        """The same engine with adapters, see :class:`fstq_infer.runtime.engine.Engine`."""
        if not any(adapters):
            return self
        if self._matrices is not None:
            return OrtAdapted(self, self._matrices.bound(adapters))
        if self._adapted is None:
            if not (self._directory / ADAPTED).is_file():
                raise EngineError(
                    f"{self._directory} has no inputs for adapters. Export the model again with --adapter, or with "
                    "--adapter-targets all."
                )
            self._adapted = OrtEngine(self._directory, self._bundle, threads=self._threads, model=ADAPTED)
        return self._adapted.adapted(adapters)

    def forward(self, input_ids: Int64, position_ids: Int64, keep: Int64, cache: Any) -> Step:
        """Run one call: ids and positions (batch, sequence), keep (batch, stages); see docs/bundle-format.md.

        Raises EngineError for shapes that do not fit together, and for what ONNX Runtime reports.
        """
        more = self._matrices.none if self._matrices is not None else ()
        return self._forward(input_ids, position_ids, keep, cache, more, self._caches)

    def _forward(
        self,
        input_ids: Int64,
        position_ids: Int64,
        keep: Int64,
        cache: Any,
        more: Sequence[Any],
        caches: ReturnedCaches | SharedCaches,
    ) -> Step:
        """more: OrtValues for the inputs between ``keep`` and the cache."""
        if not isinstance(cache, (ReturnedCache, SharedCache)) or cache.session is not self._session:
            raise EngineError("the cache is not of this engine; begin with the engine's own empty_cache()")
        batch, shape = cache.batch, input_ids.shape
        check_call(input_ids, position_ids, keep, batch, len(self._stages))
        if input_ids is not self._given[0] or position_ids is not self._given[1] or keep is not self._given[2]:
            self._wrap(input_ids, position_ids, keep)
        given: Sequence[Any] = self._values
        if more:
            if self._joined[0] is not self._values or self._joined[1] is not more:
                self._joined = (self._values, more, [*self._values, *more])  # the same object while nothing changes
            given = self._joined[2]
        try:
            found, made, shortlist = caches.run(given, self._given, cache)
        except EngineError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(f"ONNX Runtime failed on {batch} x {shape[1]} tokens: {brief(error)}") from error
        logits = found[0][:, 0]
        if logits.itemsize != 4:
            logits = logits.astype(np.float32)
        # A token alone stays; looking takes longer.
        kept = tuple(found[1:]) if shape[1] > 1 else self._alone(batch, position_ids)
        return Step(logits, kept, made, shortlist)

    def _alone(self, batch: int, position_ids: Int64) -> tuple[Int64, ...]:
        """Kept indices of single tokens; the same arrays for the same number of rows where none is padding."""
        for row in range(batch):
            if position_ids.item(row) < 0:
                return (np.minimum(position_ids, 0),) * len(self._stages)
        if batch not in self._first:
            array = np.zeros((batch, 1), np.int64)
            array.flags.writeable = False
            self._first[batch] = (array,) * len(self._stages)
        return self._first[batch]

    def _wrap(self, *given: Int64) -> None:
        """OrtValues over the arrays' own memory: a caller that writes into the same ones each time needs no others."""
        arrays = tuple(np.ascontiguousarray(array, np.int64) for array in given)
        self._values = [self._caches.graph.wrap(array) for array in arrays[: self._fixed]]
        self._given = arrays  # keeps the memory; an array that had to be copied is not the caller's and never matches


class OrtAdapted(Adapted[OrtEngine]):
    """An :class:`OrtEngine` whose graph has inputs for adapters, with adapters given."""

    def __init__(self, engine: OrtEngine, bound: Bound) -> None:
        self._engine, self._bound = engine, bound
        if bound.probes and engine._probed is None:
            engine._probed = engine._make_caches(bound.probes)
        self._caches = engine._probed if bound.probes and engine._probed is not None else engine._caches

    def empty_cache(self, batch: int) -> ReturnedCache | SharedCache:
        """A cache without tokens for as many rows as there are adapters, or for any number where there is one."""
        if self._bound.rows not in (1, batch):
            raise EngineError(f"{self._bound.rows} rows have adapters, but the cache is for {batch}; expected as many")
        return self._engine._empty(batch, self._caches)

    def forward(self, input_ids: Int64, position_ids: Int64, keep: Int64, cache: Any) -> Step:
        """Run one call, see :meth:`OrtEngine.forward`."""
        return self._engine._forward(input_ids, position_ids, keep, cache, self._bound.values, self._caches)

    def adapted(self, adapters: Sequence[Adapter | None]) -> Engine:
        """Other adapters in place of these."""
        return self._engine.adapted(adapters)


def contract(layers: int, stages: int, lora: LoraPorts | None = None) -> tuple[dict[str, Port], dict[str, Port]]:
    """Inputs and outputs of graph contract 1 by name; those of the cache come last, in the same order."""
    cached = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = dict.fromkeys(["input_ids", "position_ids", *["keep"] * bool(stages)], INDICES)
    inputs |= {name: LORA for one in (lora.linears if lora is not None else ()) for name in one.ports}
    inputs |= {f"past_positions.{group}": INDICES for group in range(stages + 1)}
    inputs |= {f"past_key_values.{name}": CACHED for name in cached}
    outputs = {"logits": LOGITS} | {f"kept_indices.{group}": INDICES for group in range(1, stages + 1)}
    outputs |= {f"present_positions.{group}": INDICES for group in range(stages + 1)}
    outputs |= {f"present.{name}": CACHED for name in cached}
    return inputs, outputs


def import_onnxruntime() -> ModuleType:
    """The module; raises MissingExtraError where it is not installed, EngineError where it does not load."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("The ONNX Runtime backend", error.name or "onnxruntime", "ort") from error
    except ImportError as error:
        raise EngineError(f"onnxruntime is installed but does not load: {error}. Install it again.") from error
    module: ModuleType = onnxruntime
    return module


def session_options(threads: int | None) -> Any:
    """SessionOptions for this engine's sessions. Raises OptionError for a bad number of threads."""
    check_threads(threads)
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = ERRORS_ONLY
    # Weights in few bits are fused with their MatMul; the default level 4 would round the activations to int8 as well.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def _open(ort: ModuleType, path: Path, threads: int | None, provider: str, packed: bool, sparing: bool) -> Any:
    """packed: let kernels rearrange weights, which copies them; otherwise they are read from the mapped file."""
    if provider not in PROVIDERS:
        raise OptionError(f"there is no provider {provider!r} for ONNX Runtime; {suggestion(provider, PROVIDERS)}")
    wanted, options, level = PROVIDERS[provider], session_options(threads), ort.GraphOptimizationLevel
    if wanted not in ort.get_available_providers():
        raise EngineError(
            f"onnxruntime {ort.__version__} has no {wanted}, only {', '.join(ort.get_available_providers())}. Install "
            "a build with CUDA: pip uninstall onnxruntime, then pip install 'fstq-infer[ort-gpu]'."
        )
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if sparing:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = level.ORT_DISABLE_ALL if provider == "cpu" else level.ORT_ENABLE_ALL
    providers = list(dict.fromkeys([wanted, PROVIDERS["cpu"]]))
    try:  # enable_fallback would print, and go on with the CPU
        session = ort.InferenceSession(os.fspath(path), options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise EngineError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {brief(error)}") from error
    if wanted not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime fell back to {', '.join(session.get_providers())}: {wanted} could not be started. Check the "
            "CUDA and cuDNN libraries that it names, or use the provider 'cpu'."
        )
    return session


def _native(ort: ModuleType) -> Any:
    """ONNX Runtime's native types: its Python wrappers around them cost a third of a millisecond for 24 layers."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    return onnxruntime_pybind11_state


def _named(found: Any, names: list[str]) -> list[Any]:
    by_name = {item.name: item for item in found}
    return [by_name[name] for name in names]


def _check(
    path: Path,
    session: Any,
    inputs: Mapping[str, Port],
    outputs: Mapping[str, Port],
    stages: int,
    vocabulary: int,
) -> None:
    """Raises EngineError that names what differs from graph contract 1."""
    wrong = []
    for what, found, expected in (
        ("input", session.get_inputs(), inputs),
        ("output", session.get_outputs(), outputs),
    ):
        by_name = {item.name: item for item in found}
        wrong += [f"{what} {name} is missing" for name in expected if name not in by_name]
        wrong += [f"{what} {name} is not expected" for name in by_name if name not in expected and name not in OWN]
        for name, (types, rank) in expected.items():
            item = by_name.get(name)
            if item is not None and (item.type not in types or len(item.shape) != rank):
                accepted = " or ".join(types)
                wrong.append(f"{what} {name} is {item.type} {item.shape}, expected {accepted} of rank {rank}")
    if not wrong:
        wrong += _check_sizes(session, inputs, outputs, stages, vocabulary)
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise EngineError(
            f"{path} does not follow graph contract 1 as its manifest describes it ({stages} pruning stages): "
            f"{'; '.join(wrong[:5])}{more}. Export the model again."
        )


def _check_sizes(
    session: Any, inputs: Mapping[str, Port], outputs: Mapping[str, Port], stages: int, vocabulary: int
) -> list[str]:
    """What is wrong with the dimensions that have to be known beforehand, and with the types of the cache."""
    ins, outs = _named(session.get_inputs(), list(inputs)), _named(session.get_outputs(), list(outputs))
    wrong, cached = [], [port for port in ins if port.name.startswith("past_")]
    for past, present in zip(cached, outs[stages + 1 :], strict=True):
        if past.type != present.type:
            wrong.append(f"output {present.name} is {present.type}, but input {past.name} is {past.type}")
        if len(past.shape) == 4 and not all(isinstance(past.shape[i], int) and past.shape[i] > 0 for i in (1, 3)):
            wrong.append(f"input {past.name} is {past.shape}, expected fixed numbers of heads and of their width")
    for item, expected in ((ins[2], stages),) * bool(stages) + ((outs[0], vocabulary),):
        if isinstance(item.shape[-1], int) and item.shape[-1] != expected:
            wrong.append(f"{item.name} is {item.shape}, expected {expected} columns")
    return wrong


def brief(error: Exception) -> str:
    """ONNX Runtime's message in one line, without what is in the middle of a long one: the reason comes last."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:150]} ... {text[-440:]}"
