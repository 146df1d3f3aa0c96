"""What a bundle holds beside graph and weights: tokenizer and template, the report's content, the manifest."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fstq_export import decoder
from fstq_export.calibrate import SHOWN, Calibration
from fstq_export.passes.pruning import PruneStage
from fstq_export.request import Request
from fstq_export.source import Source
from fstq_export.verify import Verification
from fstq_infer.bundle import Contract, GenerationDefaults, Manifest, ModelInfo, Provenance, Pruning
from fstq_infer.runtime.chat import ChatTemplate
from fstq_infer.runtime.text import TextStream, Tokenizer

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


def write_texts(tokens: Any, folder: Path) -> None:
    """tokenizer.json and the chat template."""
    (folder / "tokenizer.json").write_text(tokens.backend_tokenizer.to_str(), encoding="utf-8")
    template = tokens.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        ChatTemplate(template)  # a template that the runtime cannot use is an error now, not on the device
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Made:
    """What an export has decided by the time that the bundle is written."""

    request: Request
    model: Source
    parameters: int
    stages: Sequence[PruneStage]
    calibration: Calibration | None

    def report(self, tokens: Any, left_out: int, checked: Verification, nodes: int, folder: Path) -> dict[str, Any]:
        """The content of report.json, without what the steps of the export measured of themselves.

        left_out: calibration items that were too long. nodes: of the graph. folder: where graph and weights lie.
        """
        model, calibration = self.model, self.calibration
        measured = None
        if calibration is not None:
            measured = calibration.report | {"left_out": left_out, "example": _example(tokens, calibration)}
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
            "verification": checked.to_json(),
            "graph": {
                "stages": [
                    {"layer": s.stage.layer, "sink": s.stage.sink, "window": s.stage.window} for s in self.stages
                ],
                "bytes": size,
                "nodes": nodes,
            },
        }

    def manifest(self, generation: GenerationDefaults) -> Manifest:
        """The bundle's manifest, without adapters and without files."""
        model, calibration = self.model, self.calibration
        config, recipe, merge = model.config, self.request.recipe, self.request.adapters.merge
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
            stages=tuple(s.stage for s in self.stages),
            pruning=Pruning(
                keep if self.stages else 1.0,
                calibration.score if calibration else "window",
                calibration is not None,
                contract,
                calibration.auto if calibration is not None else None,
            ),
            generation=generation,
            provenance=Provenance(
                source=_public(model.name) + (f" with adapter {merge.resolve().name}" if merge is not None else ""),
                source_sha256=model.sha256,
                libraries={name: _version(name) for name in LIBRARIES},
                seed=recipe.seed,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                tool=f"fstq-infer {_version('fstq-infer')}",
            ),
        )


def _example(tokens: Any, calibration: Calibration) -> dict[str, Any]:
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
