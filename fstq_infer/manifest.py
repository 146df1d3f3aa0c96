"""The manifest of a bundle: its dataclasses, their JSON, and the checks that need no file.

Implements steps 2 to 5 of docs/bundle-format.md, version 1, as far as they concern the text of manifest.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from fstq_infer.adapters.info import AdapterInfo, infos
from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.errors import BundlePathError, BundleVersionError, ManifestError
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import Auto
from fstq_infer.strict_json import INT32, INT64, MANIFEST, MAX_ITEMS, REPAIR, JsonObject, is_integer, load, show

FORMAT, VERSION, GRAPH_CONTRACT = "fstq-bundle", 1, 1
FILE_CAPS: Mapping[str, int] = {  # name -> largest size in bytes
    "model.onnx": 256 << 20,
    "model.onnx.data": 64 << 30,
    "tokenizer.json": 64 << 20,
    "chat_template.jinja": 256 << 10,
    "plan.toml": 4 << 20,
    "report.json": 16 << 20,
    "report.html": 16 << 20,
}
REQUIRED_FILES = ("model.onnx", "tokenizer.json", "report.json")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and lower-case hex SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was exported; ``parameters`` is a count, ``max_positions`` in tokens."""

    architecture: str
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    parameters: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Contract:
    """The quality contract: ``drop`` of ``metric`` against dense, as a fraction; below zero is better than dense."""

    met: bool
    metric: str
    max_drop: float
    drop: float


@dataclass(frozen=True, slots=True)
class Pruning:
    """Default keep ratio in (0, 1], the score that ranks tokens, and what was measured (None: nothing).

    keep: of the last stage, or one for each stage. auto: what ``keep="auto"`` means, None where it is not offered.
    """

    keep: float | tuple[float, ...]
    score: str
    calibrated: bool
    contract: Contract | None
    auto: Auto | None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the bundle comes from; ``libraries`` maps names to versions."""

    source: str
    source_sha256: str
    libraries: Mapping[str, str]
    seed: int
    created: str
    tool: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json. Only :meth:`from_json` checks values; ``BundleWriter.commit`` passes through it too."""

    model: ModelInfo
    stages: tuple[Stage, ...]
    pruning: Pruning
    generation: GenerationDefaults
    provenance: Provenance
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    lora: LoraPorts | None = None  # what the graph's inputs for adapters are, if it has any
    adapters: Mapping[str, AdapterInfo] = field(default_factory=dict)

    def to_json(self) -> str:
        """The same text for equal manifests. Raises ManifestError for a value that JSON does not have, like NaN."""
        graph = {"contract": GRAPH_CONTRACT, "stages": [asdict(stage) for stage in self.stages]}
        data = {
            "format": FORMAT,
            "version": VERSION,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "model": asdict(self.model),
            "graph": graph if self.lora is None else graph | {"lora": self.lora.to_json()},
            "pruning": asdict(self.pruning),
            "generation": asdict(self.generation),
            "provenance": asdict(self.provenance) | {"libraries": dict(sorted(self.provenance.libraries.items()))},
        }
        if self.adapters:
            data["adapters"] = {name: one.to_json() for name, one in sorted(self.adapters.items())}
        try:
            return json.dumps(data, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ManifestError(f"{MANIFEST} cannot be written: {error}. Use plain, finite Python values.") from error

    @classmethod
    def from_json(cls, data: str | bytes) -> Manifest:
        """Parse and check steps 2 to 4 of the spec, and the names of step 5.

        Raises ManifestError, BundleVersionError, BundlePathError; whatever the input, nothing else.
        """
        top = JsonObject(load(data), "the manifest")
        top.choice("format", (FORMAT,))
        version = top.integer("version", -INT64, INT64)
        if version != VERSION:
            age, what_to_do = ("a newer", "Update fstq-infer") if version > VERSION else ("an older", "Export it again")
            raise BundleVersionError(
                f"{MANIFEST}: the bundle has version {version}, {age} one than version {VERSION}, which this "
                f"fstq-infer reads. {what_to_do}."
            )
        entries = top.nested("files")
        listed = {name: entries.nested(name) for name in entries.data}
        files = {
            name: FileEntry(entry.integer("bytes", 0, INT64), entry.sha256("sha256")) for name, entry in listed.items()
        }
        for name in REQUIRED_FILES:
            entries.nested(name)
        model, graph = _model(top.nested("model")), top.nested("graph")
        stages = _stages(graph, model.layers)
        lora = None if graph.data.get("lora") is None else LoraPorts.from_json(graph.nested("lora"), model.layers)
        adapters: Mapping[str, AdapterInfo] = {}
        if top.data.get("adapters") is not None:
            adapters = infos(top.nested("adapters"), lambda data: _pruning(data, len(stages)))
        if adapters and lora is None:
            raise graph.bad("lora", "an object, since there are adapters")
        manifest = cls(
            model=model,
            stages=stages,
            pruning=_pruning(top.nested("pruning"), len(stages)),
            generation=_generation(top.nested("generation"), model.vocab_size),
            provenance=_provenance(top.nested("provenance")),
            files=files,
            lora=lora,
            adapters=adapters,
        )
        for name in files:
            if name not in FILE_CAPS:
                raise BundlePathError(
                    f"{MANIFEST}: 'files' holds {show(name)}, expected only {', '.join(FILE_CAPS)}. {REPAIR}"
                )
        return manifest


def _model(data: JsonObject) -> ModelInfo:
    return ModelInfo(
        architecture=data.text("architecture"),
        model_type=data.text("model_type"),
        layers=data.integer("layers", 1, INT32),
        hidden_size=data.integer("hidden_size", 1, INT32),
        vocab_size=data.integer("vocab_size", 1, INT32),
        max_positions=data.integer("max_positions", 1, INT32),
        parameters=data.integer("parameters", 1, INT64),
        dtype=data.choice("dtype", DTYPES),
    )


def _stages(data: JsonObject, layers: int) -> tuple[Stage, ...]:
    data.integer("contract", GRAPH_CONTRACT, GRAPH_CONTRACT)
    stages: list[Stage] = []
    for index, item in enumerate(data.array("stages")):
        stage = JsonObject(item, f"stage {index} of 'graph'")
        lowest = stages[-1].layer + 1 if stages else 1
        stages.append(
            Stage(
                layer=stage.integer("layer", lowest, layers - 1),
                sink=stage.integer("sink", 0, INT32),
                window=stage.integer("window", 0, INT32),
            )
        )
    return tuple(stages)


def _keep(data: JsonObject, stages: int) -> float | tuple[float, ...]:
    """A keep ratio, or a list of one for each stage."""
    if not isinstance(data.get("keep", "a keep ratio"), list):
        return data.number("keep", above=0, high=1)
    given = data.array("keep")
    ratios: list[float] = []
    for ratio in given:
        if isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio <= (ratios or [1.0])[-1]:
            ratios.append(float(ratio))
    if not len(ratios) == len(given) == stages > 1:
        expected = "a number above 0 and at most 1, or a list of such numbers that do not rise, one for each stage of"
        raise data.bad("keep", f"{expected} several ({stages} here)")
    return tuple(ratios)


def _pruning(data: JsonObject, stages: int) -> Pruning:
    contract = None
    if data.get("contract", "an object or null") is not None:
        measured = data.nested("contract")
        contract = Contract(
            met=measured.boolean("met"),
            metric=measured.text("metric"),
            max_drop=measured.number("max_drop", low=0),
            drop=measured.number("drop"),
        )
    auto = None
    if data.get("auto", "an object or null") is not None:
        adaptive = data.nested("auto")
        auto = Auto(adaptive.number("mass", low=1e-6, high=0.999999), adaptive.integer("floor", 0, INT32))
    return Pruning(_keep(data, stages), data.text("score"), data.boolean("calibrated"), contract, auto)


def _generation(data: JsonObject, vocab_size: int) -> GenerationDefaults:
    begin = None
    if data.get("bos_token_id", "a token id or null") is not None:
        begin = data.integer("bos_token_id", 0, vocab_size - 1)
    ends = []
    for token in data.array("eos_token_ids"):
        if not is_integer(token, 0, vocab_size - 1):
            raise data.bad("eos_token_ids", f"token ids from 0 to {vocab_size - 1}, but one is {show(token)}")
        ends.append(token)
    return GenerationDefaults(
        bos_token_id=begin,
        eos_token_ids=tuple(ends),
        temperature=data.number("temperature", low=0),
        top_k=data.integer("top_k", 0, INT32),
        top_p=data.number("top_p", above=0, high=1),
        repetition_penalty=data.number("repetition_penalty", above=0),
    )


def _provenance(data: JsonObject) -> Provenance:
    libraries = data.nested("libraries")
    if len(libraries.data) > MAX_ITEMS:
        raise data.bad("libraries", f"at most {MAX_ITEMS} names and versions")
    return Provenance(
        source=data.text("source"),
        source_sha256=data.sha256("source_sha256"),
        libraries={name: libraries.text(name) for name in libraries.data},
        seed=data.integer("seed", 0, INT64),
        created=data.text("created"),
        tool=data.text("tool"),
    )
