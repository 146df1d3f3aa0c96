"""A bundle's graph lowered for ONNX Runtime's CPU kernels: which passes, what they need, and parts of them to check."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError, MissingExtraError
from fstq_infer.runtime.ort import ADAPTED, MODEL, import_onnxruntime, session_options

WEIGHTS = "model.onnx.data"
_log = logging.getLogger(__name__)


class Lowering:
    """What lowering one of an engine's graphs takes, before and after it is done.

    name: ADAPTED, or MODEL, which has no inputs for adapters. memory, disk: bytes that a build needs at most for
    weights. in_place: whether caches are written in place. rounding: layers whose inputs are rounded, and checked: what
    their kernels differ by, both after :meth:`write`.
    Raises MissingExtraError without onnx-ir, EngineError for a graph that cannot be read.
    """

    def __init__(self, bundle: Bundle, name: str = MODEL) -> None:
        try:
            import onnx_ir
        except ModuleNotFoundError as error:
            raise MissingExtraError("Building an engine", error.name or "onnx_ir", "ort") from error
        self.ir: Any = onnx_ir
        self.bundle, self.name, self.rounding = bundle, name, 0
        self.checked: Mapping[str, Any] = {}
        self._borders = [stage.layer for stage in bundle.manifest.stages]
        model = self._load()
        self.memory, self.disk = self._needs(model)
        self.in_place = self._can_scatter(model)

    def write(self, out: Path) -> None:
        """The graph as this onnxruntime runs it best, with all its weights."""
        from fstq_engines import kernels
        from fstq_engines.quantized import QuantizedLayers

        layers = QuantizedLayers(kernels.difference)
        self._save(self._passed(layers, *self._scatter()), out)
        self.rounding = layers.rounding
        self.checked = {"lowered": layers.changed, "refused": layers.refused, "difference": layers.worst}

    @contextmanager
    def temporary(self, out: Path, what: str) -> Iterator[Path]:
        """The graph before lowering with one change: "in place", its caches, or "rounded", its layers' inputs."""
        from fstq_engines.rounding import RoundedInputs

        try:
            self._save(self._passed(*(self._scatter() if what == "in place" else [RoundedInputs()])), out)
            yield out
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _scatter(self) -> list[Any]:
        from fstq_engines.shortlist import Shortlist
        from fstq_engines.static_cache import StaticCache

        return [StaticCache(self._borders), Shortlist()] if self.in_place else []

    def _without_adapters(self) -> list[Any]:
        from fstq_engines.lora import WithoutAdapters

        return [] if self.bundle.manifest.lora is None or self.name == ADAPTED else [WithoutAdapters()]

    def _load(self) -> Any:
        path = self.bundle.file(MODEL)
        try:
            return self.ir.load(path)
        except (OSError, ValueError, TypeError, NotImplementedError) as error:
            raise EngineError(f"{path} cannot be read: {error}. Fetch an undamaged copy.") from error

    def _passed(self, *passes: Any) -> Any:
        path, model = self.bundle.file(MODEL), self._load()
        passes = (*self._without_adapters(), *passes)
        if not passes:
            return model
        try:
            return self.ir.passes.Sequential(*passes)(model).model
        except (self.ir.passes.PassError, self.ir.passes.InvariantError) as error:
            raise EngineError(
                f"{path} is not built as expected: {error.__cause__ or error}. Export it again."
            ) from error

    def _save(self, model: Any, out: Path) -> None:
        try:
            out.mkdir()
            self.ir.save(model, out / self.name, external_data=f"{self.name}.data")
        except OSError as error:
            raise EngineError(f"{out.parent} cannot be written: {error}. Free some space, and build again.") from error
        del model
        gc.collect()  # a model is a cycle, and holds weights

    def _can_scatter(self, model: Any) -> bool:
        """Whether this onnxruntime and this graph can write caches in place; else engines copy them at each call."""
        from fstq_engines.static_cache import StaticCache, probe_model

        try:
            import_onnxruntime().InferenceSession(probe_model(), session_options(1), providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime's exceptions have no common base
            _log.info("this onnxruntime has no TensorScatter: the engine will copy its cache at each call")
            return False
        try:
            StaticCache(self._borders).requires(model)
        except self.ir.passes.PreconditionError as error:
            _log.warning("the engine will copy its cache at each call: %s", error)
            return False
        return True

    def _needs(self, model: Any) -> tuple[int, int]:
        """(memory, disk): weights are read and written or prepacked; codes are packed anew, one table perhaps twice.

        A bundle's own graph makes numbers of one matrix of codes at a time, and turns it.
        """
        from fstq_engines.quantized import layers

        files = self.bundle.manifest.files
        size = sum(files[name].bytes for name in (MODEL, WEIGHTS) if name in files)
        lowered, widest = size, 0
        seen: set[tuple[str, str]] = set()
        for layer in layers(model.graph):
            key = layer.weight.name, layer.ways[0]
            if key not in seen:
                first = not any(name == layer.weight.name for name, _ in seen)
                seen.add(key)
                lowered += max(map(layer.weight.bytes, layer.ways)) - layer.weight.stored * first
                widest = max(widest, 4 * layer.weight.shape[0] * layer.weight.shape[1])
        return max(2 * lowered, lowered + size) + 2 * widest, 2 * lowered + 2 * size
