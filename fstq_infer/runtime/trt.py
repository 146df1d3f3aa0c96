"""The TensorRT backend: a built plan behind the engine protocol. Knows no cache of engines and no text.

Memory is allocated with the first call of a batch size or adapter and goes with the engine; a token is decoded by one
launch of a CUDA graph that holds uploads, kernels and the download of logits. How keys and values are kept is told in
:mod:`fstq_infer.runtime.trt_buffers`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError, EngineMismatchError
from fstq_infer.runtime.cuda import Cuda
from fstq_infer.runtime.engine import Int64, Stage, Step, check_call
from fstq_infer.runtime.trt_adapters import Given, Matrices, TrtAdapted
from fstq_infer.runtime.trt_buffers import Bound, Buffers, TrtCache, finally_call
from fstq_infer.runtime.trt_ports import Ports

if TYPE_CHECKING:
    from fstq_infer.adapters.store import Adapter

PLAN, SIDECAR, SIDECAR_CAP = "model.plan", "engine.json", 1 << 20
PREFILL, DECODE = 0, 1  # optimization profiles


class TrtEngine:
    """One plan with an execution context for many tokens; buffers have one each for a single token of each row."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        bundle: Bundle,
        *,
        threads: int | None = None,
        provider: str = "cuda",
        module: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        """module, cuda: TensorRT's and CUDA's Python modules; default: the ones the engine was built with.

        Raises EngineError without a GPU or for a damaged plan, EngineMismatchError for another TensorRT's plan.
        """
        del threads, provider
        model = bundle.manifest.model
        self._stages, self._vocab = bundle.manifest.stages, model.vocab_size
        self._path = Path(directory)
        self._built = _sidecar(self._path)
        self._module = module or _import(self._built, self._path)
        self.cuda = cuda or Cuda.load()
        self._check_versions(bundle)
        self._logger = self._module.Logger(self._module.Logger.ERROR)
        self._runtime = self._module.Runtime(self._logger)  # outlives the engine
        plan = self._runtime.deserialize_cuda_engine((self._path / PLAN).read_bytes())
        if plan is None:
            raise EngineError(
                f"{self._path / PLAN} does not deserialize on this GPU with {self._built['backend']} "
                f"{self._module.__version__}. Rebuild it with: {self._rebuild(bundle)}"
            )
        self._plan = plan
        self.ports = Ports.of(plan, self._module, self._stages)
        self._stream = self.cuda("cudaStreamCreate")
        finally_call(self, self.cuda, "cudaStreamDestroy", self._stream)
        self._matrices = Matrices(self.cuda, self._stream, self.ports, self._path)
        self._prefill = Bound(self._context(PREFILL))
        self._empty: dict[int, TrtCache] = {}
        self._pool: dict[int, Buffers] = {}
        self._positions = min(model.max_positions, self.ports.context)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The graph's pruning stages, in layer order."""
        return self._stages

    @property
    def max_positions(self) -> int:
        """Longest context in tokens, generated ones included: what the engine was built for."""
        return self._positions

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab

    def empty_cache(self, batch: int) -> TrtCache:
        """A cache without tokens for ``batch`` rows; the same object for the same number of rows."""
        if not 1 <= batch <= self.ports.batch:
            raise EngineError(
                f"a cache for {batch} rows is not possible: the engine was built for 1 to {self.ports.batch}. Build "
                "one with --batch"
            )
        if batch not in self._empty:
            self._empty[batch] = TrtCache(self, batch, None, (0,) * (len(self._stages) + 1))
        return self._empty[batch]

    def adapted(self, adapters: Sequence[Adapter | None]) -> TrtEngine | TrtAdapted:
        """The same engine with adapters, see :class:`fstq_infer.runtime.engine.Engine`."""
        return TrtAdapted(self, self._matrices.bound(adapters)) if any(adapters) else self

    def forward(self, input_ids: Int64, position_ids: Int64, keep: Int64, cache: Any) -> Step:
        """Run one call: ids and positions (batch, sequence), keep (batch, stages); see docs/bundle-format.md.

        Raises EngineError for shapes that do not fit together or the engine, and for what CUDA reports.
        """
        return self.run(input_ids, position_ids, keep, cache, self._matrices.none)

    def run(self, input_ids: Int64, position_ids: Int64, keep: Int64, cache: Any, given: Given) -> Step:
        """:meth:`forward` with adapters."""
        self._check(input_ids, position_ids, keep, cache)
        count = input_ids.shape[1]
        most = [count]
        for stage in range(len(self._stages)):
            asked = keep[:, stage]
            most.append(most[-1] if count == 1 or (asked < 0).any() else min(most[-1], max(1, int(asked.max()))))
        needed = max(length + more for length, more in zip(cache.lengths, most, strict=True))
        if needed > self.ports.context:
            raise EngineError(
                f"{needed} tokens would be cached, the engine was built for {self.ports.context}. Build one with "
                f"--context {needed}, or use a shorter prompt"
            )
        buffers = self._own(cache)
        kept = buffers.run(self._prefill, input_ids, position_ids, keep, most, given)
        if kept is None:
            raise EngineError(f"TensorRT failed on {cache.batch} x {count} tokens; its log says why")
        return Step(buffers.logits, kept, TrtCache(self, cache.batch, buffers, buffers.filled))

    def _own(self, cache: TrtCache) -> Buffers:
        """Buffers to go on in: the cache's own where it is the newest view of them, else others with what it holds."""
        buffers = cache.buffers
        if buffers is not None and buffers.filled == cache.lengths:
            return buffers
        free = self._pool.get(cache.batch)
        if free is None or free.users or free is buffers:
            free = self._pool[cache.batch] = Buffers(
                self.cuda, self.ports, cache.batch, self._stream, lambda: self._context(DECODE)
            )
        free.reset()
        if buffers is not None:
            free.take_over(buffers, cache.lengths)
        return free

    def _context(self, profile: int) -> Any:
        strategies = getattr(self._module, "ExecutionContextAllocationStrategy", None)
        # Scratch memory of this profile alone: a token needs much less than a prompt.
        given = () if strategies is None else (strategies.ON_PROFILE_CHANGE,)
        context = self._plan.create_execution_context(*given)
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(
                f"there is no memory to run {self._path}: build with a shorter --context or --prompt, or close programs"
            )
        self.cuda("cudaStreamSynchronize", self._stream)
        return context

    def _check(self, ids: Int64, positions: Int64, keep: Int64, cache: Any) -> None:
        if not isinstance(cache, TrtCache) or cache.engine is not self:
            raise EngineError("the cache is not of this engine; begin with the engine's own empty_cache()")
        check_call(ids, positions, keep, cache.batch, len(self._stages))
        if ids.shape[1] > self.ports.prompt:
            raise EngineError(
                f"a call of {ids.shape[1]} tokens is longer than the {self.ports.prompt} that the engine was built "
                f"for. Build one with --prompt {ids.shape[1]}"
            )

    def _check_versions(self, bundle: Bundle) -> None:
        """Raises EngineMismatchError where TensorRT or the GPU is another than when the engine was built."""
        details = self._built.get("details", {})
        here = (str(self._module.__version__), self.cuda.architecture())
        built = (str(details.get("tensorrt")), details.get("built_for_sm"))
        if here != built:
            raise EngineMismatchError(
                f"the engine in {self._path} was built by {self._built['backend']} {built[0]} for SM {built[1]}, here "
                f"are {here[0]} and SM {here[1]}. Rebuild it with: {self._rebuild(bundle)}"
            )

    def _rebuild(self, bundle: Bundle) -> str:
        return f"fstq build {bundle.path} {self._built.get('arguments', '')} --force"


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        with (path / SIDECAR).open("rb") as file:
            found = json.loads(file.read(SIDECAR_CAP))
        if not isinstance(found, dict) or "backend" not in found:
            raise ValueError("no engine's description")
        return found
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{path} holds no engine: {error}. Build one with: fstq build BUNDLE --backend tensorrt"
        ) from error


def _import(built: dict[str, Any], path: Path) -> Any:
    name = str(built["backend"])
    if name not in ("tensorrt", "tensorrt_rtx"):
        raise EngineError(f"{path} is an engine of {name}, expected one of tensorrt or tensorrt_rtx")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{path} needs the Python module {name!a}, which does not load: {error}") from error
