"""``fstq export``: checkpoint -> calibrated, token-pruned, verified bundle. Knows the order of the steps."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fstq_export import data, decoder, precision, report, source, timing, verify
from fstq_export.calibrate import SHOWN, Calibration, Calibrator
from fstq_export.continuation import with_continuations
from fstq_export.contract import split
from fstq_export.heldout import whole_outcome
from fstq_export.meter import quantize_in_place, rounding_inputs
from fstq_export.passes.pruning import PruneStage
from fstq_export.recipe import Recipe
from fstq_export.reference import parameter_count, reference
from fstq_export.sensitivity import weights
from fstq_export.source import Source
from fstq_export.wanted import Precision
from fstq_infer.bundle import BundleWriter, Contract, GenerationDefaults, Manifest, ModelInfo, Provenance, Pruning
from fstq_infer.errors import ExportError, OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.probe import QUERIES, Probe
from fstq_infer.machine import peak_rss
from fstq_infer.quant import plan as plans
from fstq_infer.runtime.chat import ChatTemplate
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.text import TextStream, Tokenizer

CONTINUATION = 16
LIBRARIES = (
    "mobius-onnx",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "fstq-infer",
)
SMALL_MODEL, ITEMS_SMALL, ITEMS_LARGE = 50_000_000, 1800, 256
_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to export. calib: calibration file; of it at most calib_items prompts of at most max_prompt tokens.

    dtype: of computation, and of weights that precision gives no format.
    """

    model: str
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    calib: Path | None = None
    calib_items: int | None = None
    max_prompt: int | None = None
    dtype: str = "float32"
    overwrite: bool = False
    revision: str | None = None
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        if self.dtype not in decoder.DTYPES:
            raise OptionError(f"dtype is '{self.dtype}'; expected one of {', '.join(decoder.DTYPES)}")
        if self.calib_items is not None and self.calib_items < 1:
            raise OptionError(f"calib-items is {self.calib_items}; expected a number of items above 0")
        if self.max_prompt is not None and self.max_prompt < 1:
            raise OptionError(f"max-prompt is {self.max_prompt}; expected a number of tokens above 0")
        plan = self.precision.plan
        if self.dtype == "float16" and "fp32" in (self.precision.format, *(plan.formats.values() if plan else ())):
            raise OptionError("weights in fp32 have no place in a float16 graph; take fp16, or --dtype float32")


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
        self.quantized: precision.Result | None = None

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self.progress(name, 0, 1)
        yield
        self.progress(name, 1, 1)
        self.steps[name] = round(time.monotonic() - started, 2)

    def run(self) -> Done:
        """Export; the bundle appears whole at ``request.out`` or not at all."""
        began = time.monotonic()
        request = self.request
        with BundleWriter(request.out, overwrite=request.overwrite) as writer:
            examples = data.read(request.calib) if request.calib else []
            with self._step("read model"):
                model = source.resolve(request.model, request.revision)
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
                with self._step("give formats"), reference(model, stream=False) as frozen:
                    self._quantize(frozen, [], [])
            stages = self._stages(model, calibration)
            if self.quantized:
                (writer.path / plans.NAME).write_text(self.quantized.plan.to_toml(), encoding="utf-8")
            with self._step("build graph"):
                codes = (self.quantized.weights, self.quantized.prints) if self.quantized else ()
                graph = decoder.build_graph(model, request.dtype, stages, *codes)
                nodes = len(graph.graph)
            with self._step("write weights"):
                decoder.save(graph, writer.path)
            del graph
            gc.collect()  # the checkpoint stays mapped as long as the graph is referenced
            with self._step("verify"):
                checked = self._verify(model, writer.path, stages, held, tokens)
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
                self._texts(tokens, writer.path)
                content = self._report(model, tokens, calibration, left_out, checked, stages, nodes, writer.path, began)
                content["timing"] = times
                report.write_report(writer.path, content)
                bundle = writer.commit(self._manifest(model, calibration, stages, generation))
        return Done(bundle.path, content, time.monotonic() - began, peak_rss())

    def _calibrate(
        self, model: Source, tokens: Any, examples: Sequence[data.Example]
    ) -> tuple[Calibration, list[Item], int]:
        """(calibration, held-out items, number of items left out because of their length)."""
        request = self.request
        limit = int(model.config.max_position_embeddings)
        longest = min(request.max_prompt or limit, limit)
        with reference(model, stream=False) as frozen:
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
            if not request.precision.wanted:
                calibrator = Calibrator(frozen, fitting, request.recipe, self.progress)
                return calibrator.run(), calibrator.held, left_out
            # Probe and contract are of the model as it will be computed, beside the one that it was.
            training, held = split(fitting, request.recipe.seed)
            exact = whole_outcome(frozen, held)
            found = self._quantize(frozen, training, held)
            calibrator = Calibrator(frozen, fitting, request.recipe, self.progress, exact)
            quantize_in_place(frozen, found.weights)
            with rounding_inputs(weights(frozen), found.weights):
                return calibrator.run(), calibrator.held, left_out

    def _quantize(self, frozen: Decoder, training: Sequence[Item], held: Sequence[Item]) -> precision.Result:
        """Give every weight a format."""
        request = self.request
        planner = precision.Planner(frozen, request.precision, request.dtype, request.recipe.seed, self.progress)
        self.quantized = planner.run(training, held)
        return self.quantized

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
        self, model: Source, folder: Path, stages: Sequence[PruneStage], held: Sequence[Item], tokens: Any
    ) -> verify.Verification:
        config = model.config
        probes = [None if s.probe is None else Probe.from_arrays(s.probe, s.queries, s.stage.window) for s in stages]
        with reference(model, stream=False if self.quantized else None) as frozen:
            if self.quantized:
                quantize_in_place(frozen, self.quantized.weights)
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
                model.architecture,
                [item.prompt for item in held[:2]],
            )

    def _texts(self, tokens: Any, folder: Path) -> None:
        """tokenizer.json and the chat template."""
        (folder / "tokenizer.json").write_text(tokens.backend_tokenizer.to_str(), encoding="utf-8")
        template = tokens.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            ChatTemplate(template)  # a template that the runtime cannot use is an error now, not on the device
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def _report(
        self,
        model: Source,
        tokens: Any,
        calibration: Calibration | None,
        left_out: int,
        checked: verify.Verification,
        stages: Sequence[PruneStage],
        nodes: int,
        folder: Path,
        began: float,
    ) -> dict[str, Any]:
        measured = None
        if calibration is not None:
            measured = calibration.report | {"left_out": left_out, "example": self._example(tokens, calibration)}
        size = sum(path.stat().st_size for path in folder.iterdir() if path.name in (decoder.GRAPH, decoder.WEIGHTS))
        return {
            "format": "fstq-report",
            "version": 1,
            "model": {
                "source": _public(model.name),
                "architecture": model.architecture,
                "layers": model.layers,
                "parameters": self.parameters,
                "dtype": self.request.dtype,
            },
            "calibration": measured,
            "precision": self.quantized.report if self.quantized else None,
            "verification": checked.to_json(),
            "graph": {
                "stages": [{"layer": s.stage.layer, "sink": s.stage.sink, "window": s.stage.window} for s in stages],
                "bytes": size,
                "nodes": nodes,
            },
            "resources": {
                "seconds": round(time.monotonic() - began, 2),
                "peak_rss_bytes": peak_rss(),
                "steps": self.steps,
            },
        }

    def _example(self, tokens: Any, calibration: Calibration) -> dict[str, Any]:
        """A held-out prompt with scores and what stays at 25 %, for the heat map."""
        item, scores, kept = calibration.example
        return {
            "tokens": _pieces(tokens, item.prompt),
            "scores": [float(s) for s in scores],
            "kept": [i in kept for i in range(len(scores))],
            "keep": SHOWN,
            "question_start": None,
            "answer": tokens.decode(list(item.answer)),
        }

    def _manifest(
        self,
        model: Source,
        calibration: Calibration | None,
        stages: Sequence[PruneStage],
        generation: GenerationDefaults,
    ) -> Manifest:
        config, recipe = model.config, self.request.recipe
        contract, keep = None, recipe.wanted or 1.0
        if calibration is not None:
            contract = Contract(calibration.met, calibration.metric, recipe.max_quality_drop, calibration.drop)
            keep = calibration.keep
        return Manifest(
            model=ModelInfo(
                architecture=model.architecture,
                model_type=config.model_type,
                layers=model.layers,
                hidden_size=config.hidden_size,
                vocab_size=config.vocab_size,
                max_positions=config.max_position_embeddings,
                parameters=self.parameters,
                dtype=self.request.dtype,
            ),
            stages=tuple(s.stage for s in stages),
            pruning=Pruning(
                keep if stages else 1.0,
                calibration.score if calibration else "window",
                calibration is not None,
                contract,
                calibration.auto if calibration is not None else None,
            ),
            generation=generation,
            provenance=Provenance(
                source=_public(model.name),
                source_sha256=model.sha256,
                libraries={name: _version(name) for name in LIBRARIES},
                seed=recipe.seed,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                tool=f"fstq-infer {_version('fstq-infer')}",
            ),
        )


def _pieces(tokens: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, spaces kept; empty where a token only begins a character."""
    stream = TextStream(Tokenizer(tokens.backend_tokenizer))
    return [stream.push(token) for token in ids]


def _public(name: str) -> str:
    """The model's name for files that are passed on: of a local folder its last part, not where it lies."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


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
