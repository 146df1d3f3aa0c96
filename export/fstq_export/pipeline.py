"""``fstq export``: checkpoint -> calibrated, token-pruned, verified bundle. Knows the order of the steps."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fstq_export import adapters, contents, data, decoder, linears, precision, report, source, timing, verify
from fstq_export.calibrate import Calibration, Calibrator
from fstq_export.continuation import with_continuations
from fstq_export.contract import Outcome, split
from fstq_export.heldout import whole_outcome
from fstq_export.meter import quantize_in_place, rounding_inputs
from fstq_export.passes.probe import graph_weights
from fstq_export.passes.pruning import PruneStage
from fstq_export.recheck import Recheck, recheck
from fstq_export.reference import parameter_count, reference
from fstq_export.request import Request
from fstq_export.sensitivity import weights
from fstq_export.source import Source
from fstq_infer.adapters import fit, peft, store
from fstq_infer.adapters.info import FOLDER, AdapterInfo, path_of
from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.bundle import BundleWriter
from fstq_infer.errors import ExportError, OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.probe import QUERIES, Probe
from fstq_infer.machine import peak_rss
from fstq_infer.quant import plan as plans
from fstq_infer.runtime.engine import Stage

__all__ = ["Done", "Export", "Progress", "Request", "export"]
CONTINUATION = 16
SMALL_MODEL, ITEMS_SMALL, ITEMS_LARGE = 50_000_000, 1800, 256
_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Done:
    """A finished export. seconds, peak_rss in bytes; report is the content of report.json."""

    path: Path
    report: dict[str, Any]
    seconds: float
    peak_rss: int


class Export:
    """One run of the pipeline."""

    def __init__(self, request: Request, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.steps: dict[str, float] = {}
        self.parameters = 0  # known once the model's configuration is read
        self.training: list[Item] = []  # what calibration learnt from
        self.quantized: precision.Result | None = None
        self.ports: LoraPorts | None = None
        self.adapters: dict[str, peft.Peft] = {}  # read once: what is checked is what is written
        self.rechecked: dict[str, Recheck] = {}
        self.adapted: dict[str, dict[str, Any]] = {}  # for the report

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self.progress(name, 0, 1)
        yield
        self.progress(name, 1, 1)
        self.steps[name] = round(time.monotonic() - started, 2)

    @property
    def _stream(self) -> bool | None:
        """Training codes, and adding adapters, change weights that are in memory."""
        return False if self.request.precision.tune or self.request.adapters.given else None

    def run(self) -> Done:
        """Export; the bundle appears whole at ``request.out`` or not at all."""
        began = time.monotonic()
        request = self.request
        with ExitStack() as stack, BundleWriter(request.out, overwrite=request.overwrite) as writer:
            examples = data.read(request.calib) if request.calib else []
            with self._step("read model"):
                model = source.resolve(request.model, request.revision)
                if request.adapters.merge is not None:
                    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fstq-merged-"))) / "model"
                    model = stack.enter_context(adapters.merged(model, request.adapters.merge, scratch))
                self._check_adapters(model)
                tokens = source.tokenizer(model)
                generation = source.generation_defaults(model)
                self.parameters = parameter_count(model.config)
            calibration: Calibration | None = None
            held: list[Item] = []
            left_out = 0
            if examples:
                with self._step("calibrate"):
                    calibration, held, left_out = self._calibrate(model, tokens, examples)
            elif request.precision.wanted:
                with self._step("give formats"):
                    self._give_formats(model)
            gc.collect()  # a model that was calibrated is a cycle
            stages = self._stages(model, calibration)
            if self.quantized:
                (writer.path / plans.NAME).write_text(self.quantized.plan.to_toml(), encoding="utf-8")
            if calibration is not None and stages and request.adapters.given:
                with self._step("check adapters"):
                    self._recheck(model, calibration, held)
            with self._step("build graph"):
                codes, prints = (self.quantized.weights, self.quantized.prints) if self.quantized else (None, None)
                ports = partial(self._ports, model) if request.adapters.any else None
                graph = decoder.build_graph(model, request.dtype, stages, codes, prints, ports)
                nodes = len(graph.graph)
            with self._step("write weights"):
                decoder.save(graph, writer.path)
            del graph
            gc.collect()  # the checkpoint stays mapped as long as the graph is referenced
            with self._step("verify"):
                checked = self._verify(model, writer.path, stages, held)
                for name, adapter in self.adapters.items():
                    found = self._verify(model, writer.path, stages, held, name, adapter)
                    self.adapted.setdefault(name, {})["verification"] = found.to_json()
            with self._step("measure times"):
                times = timing.measure(
                    writer.path,
                    decoder.GRAPH,
                    self.parameters,
                    [s.stage for s in stages],
                    calibration.keep if calibration is not None else request.recipe.wanted or 1.0,
                    [item.prompt for item in held],
                    model.config.vocab_size,
                    model.config.max_position_embeddings,
                )
            with self._step("write bundle"):
                contents.write_texts(tokens, writer.path)
                made = contents.Made(request, model, self.parameters, stages, calibration)
                content = made.report(tokens, left_out, checked, nodes, writer.path) | {
                    "precision": self.quantized.report if self.quantized else None,
                    "adapters": self.adapted,
                    "timing": times,
                    "resources": {
                        "seconds": round(time.monotonic() - began, 2),
                        "peak_rss_bytes": peak_rss(),
                        "steps": self.steps,
                    },
                }
                report.write_report(writer.path, content)
                manifest = made.manifest(generation)
                bundle = writer.commit(replace(manifest, lora=self.ports, adapters=self._adapters(model, writer.path)))
        return Done(bundle.path, content, time.monotonic() - began, peak_rss())

    def _calibrate(
        self, model: Source, tokens: Any, examples: Sequence[data.Example]
    ) -> tuple[Calibration, list[Item], int]:
        """(calibration, held-out items, number of items left out because of their length)."""
        request = self.request
        limit = int(model.config.max_position_embeddings)
        longest = min(request.max_prompt or limit, limit)
        with reference(model, self._stream) as frozen:
            items = [data.encode(tokens, example) for example in examples]
            fitting = [
                i
                for i in items
                if i.prompt and len(i.prompt) <= longest and len(i) + (0 if i.answer else CONTINUATION) <= limit
            ]
            left_out = len(items) - len(fitting)
            most = request.calib_items or (ITEMS_SMALL if self.parameters < SMALL_MODEL else ITEMS_LARGE)
            if len(fitting) > most:
                order = np.random.default_rng(request.recipe.seed).permutation(len(fitting))[:most]
                fitting = [fitting[i] for i in sorted(order)]
            if any(not item.answer for item in fitting):
                total = len(fitting)
                fitting = with_continuations(
                    frozen, fitting, CONTINUATION, limit, lambda n: self.progress("continue plain texts", n, total)
                )
            self.training, held = split(fitting, request.recipe.seed)
            parts = self.training, held
            if not request.precision.wanted:
                return Calibrator(frozen, parts, request.recipe, self.progress).run(), held, left_out
            # Probe and contract are of the model as it will be computed, beside the one that it was.
            exact = whole_outcome(frozen, held)
            found = self._quantize(frozen, self.training, held)
            calibrator = Calibrator(frozen, parts, request.recipe, self.progress, exact)
            quantize_in_place(frozen, found.weights)
            with rounding_inputs(weights(frozen), found.weights):
                return calibrator.run(), held, left_out

    def _give_formats(self, model: Source) -> None:
        """Without calibration data. In a frame of its own, so that the model is gone before the graph is built."""
        with reference(model, self._stream) as frozen:
            self._quantize(frozen, [], [])

    def _quantize(self, frozen: Decoder, training: Sequence[Item], held: Sequence[Item]) -> precision.Result:
        """Give every weight a format."""
        request = self.request
        planner = precision.Planner(frozen, request.precision, request.dtype, request.recipe.seed, self.progress)
        self.quantized = planner.run(training, held)
        return self.quantized

    def _check_adapters(self, model: Source) -> None:
        """Raise for an adapter that does not fit, before minutes of calibration."""
        shapes, layers = linears.shapes_of(model) if self.request.adapters.given else ({}, {})
        self.adapters = self.request.adapters.read()
        for adapter in self.adapters.values():
            fit.check_base(adapter, model.sha256)
            peft.check_targets(adapter, shapes, layers)

    def _recheck(self, model: Source, calibration: Calibration, held: Sequence[Item]) -> None:
        """Calibration again with each adapter, on the model as it will be computed."""
        codes = self.quantized.weights if self.quantized else {}
        for name, adapter in self.adapters.items():
            exact: Outcome | None = None
            if codes:
                with reference(model, stream=False) as frozen:
                    adapters.adapt_in_place(frozen, adapter)
                    exact = whole_outcome(frozen, held)
            with reference(model, stream=False) as frozen:
                quantize_in_place(frozen, codes)
                adapters.adapt_in_place(frozen, adapter)
                with rounding_inputs(weights(frozen), codes):
                    found = recheck(
                        frozen, calibration, (self.training, held), self.request.recipe, name, self.progress, exact
                    )
            self.rechecked[name] = found
            self.adapted[name] = {"calibration": found.report}

    def _ports(self, model: Source, graph: Any) -> LoraPorts:
        """The graph's inputs for adapters; probe weights are among them where an adapter has its own."""
        ports = self.request.adapters.ports(model, graph, self.request.dtype, self.adapters)
        probes = next((p for one in self.rechecked.values() if (p := self._probes(one)) is not None), {})
        self.ports = replace(ports, probes={name: array.shape for name, array in probes.items()})
        return self.ports

    @staticmethod
    def _probes(found: Recheck | None) -> dict[str, Any] | None:
        """Weights of an adapter's own probes by name in the graph."""
        if found is None or found.probes is None:
            return None
        return {
            f"fstq.probe.{number}.{name}": array
            for number, probe in enumerate(found.probes, 1)
            if probe is not None
            for name, array in graph_weights(probe.arrays()).items()
        }

    def _adapters(self, model: Source, folder: Path) -> dict[str, AdapterInfo]:
        """Write each adapter's file; its entry in the manifest by name."""
        found = {}
        for name, adapter in self.adapters.items():
            again = self.rechecked.get(name)
            if self.ports is None:
                raise ExportError("the graph has no inputs for adapters")
            content, found[name] = store.encode(
                adapter,
                self.ports,
                self.request.dtype,
                model.sha256,
                self._probes(again),
                None if again is None else again.pruning,
            )
            (folder / FOLDER).mkdir(exist_ok=True)
            (folder / path_of(name)).write_bytes(content)
        return found

    def _stages(self, model: Source, calibration: Calibration | None) -> list[PruneStage]:
        """The stages to build: none (a dense bundle) where nothing met the contract and no layer or keep was named."""
        recipe = self.request.recipe
        if calibration is not None:
            useful = calibration.met or calibration.auto is not None
            if not useful and recipe.prune_layer is None and recipe.keep is None:
                return []
            return [
                PruneStage(Stage(layer, recipe.sink, calibration.window), None if probe is None else probe.arrays())
                for layer, probe in zip(calibration.layers, calibration.probes, strict=True)
            ]
        if not recipe.layers:
            if recipe.wanted is not None and recipe.wanted != 1:
                raise OptionError(
                    "keep is set, but there is neither calibration data nor a prune layer; "
                    "add --calib FILE or --prune-layer N"
                )
            return []
        recipe.check_layers(model.layers)
        config = model.config
        torch.manual_seed(recipe.seed)
        # Nothing is known of how the question is put, so all that the probe reads of it stays, unless told otherwise.
        window = QUERIES if recipe.window is None else recipe.window
        arrays = Probe.untrained(config.hidden_size, config.num_attention_heads, window=window).arrays()
        return [PruneStage(Stage(layer, recipe.sink, window), arrays) for layer in recipe.layers]

    def _verify(
        self,
        model: Source,
        folder: Path,
        stages: Sequence[PruneStage],
        held: Sequence[Item],
        name: str | None = None,
        adapter: peft.Peft | None = None,
    ) -> verify.Verification:
        """The written graph, with an adapter where one is given."""
        config, dtype = model.config, self.request.dtype
        probes = [None if s.probe is None else Probe.from_arrays(s.probe, s.queries, s.stage.window) for s in stages]
        more, again = adapters.empty(self.ports, dtype), self.rechecked.get(name or "")
        if again is not None and again.probes is not None:
            probes = list(again.probes)
        with reference(model, stream=False if adapter else None) as frozen:
            if self.quantized:
                quantize_in_place(frozen, self.quantized.weights)
            if adapter is not None and self.ports is not None:
                adapters.adapt_in_place(frozen, adapter)
                more = adapters.inputs(adapter, self.ports, dtype, model.sha256)
            return verify.verify(
                folder,
                decoder.GRAPH,
                frozen,
                [s.stage for s in stages],
                probes,
                config.vocab_size,
                config.max_position_embeddings,
                self.request.dtype,
                self.request.recipe.seed,
                model.architecture if name is None else f"{model.architecture} with the adapter '{name}'",
                [item.prompt for item in held[:2]],
                more,
                self._probes(again),
            )


def export(request: Request, progress: Progress = lambda _name, _done, _total: None) -> Done:
    """Export a model; see :class:`Request`. Raises FstqError subclasses; on any error nothing is written."""
    try:
        return Export(request, progress).run()
    except MemoryError as error:
        raise ExportError(
            "memory ran out during the export; calibrate with fewer items (--calib-items) "
            "or shorter prompts (--max-prompt)"
        ) from error
    except OSError as error:
        raise ExportError(f"the bundle could not be written: {error}") from error
