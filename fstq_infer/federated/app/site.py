"""What belongs to one client (or to the server): its model, its examples, its mods; kept between messages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fstq_infer.errors import ConfigError, OptionError
from fstq_infer.federated.app import privacy
from fstq_infer.federated.app.config import Config
from fstq_infer.federated.app.text import Texts
from fstq_infer.federated.compress import PRESETS
from fstq_infer.federated.data import partition, read
from fstq_infer.federated.downlink import Arrays
from fstq_infer.federated.downlink_mod import DownlinkMod
from fstq_infer.federated.mod import FstqMod
from fstq_infer.federated.order import check_mods
from fstq_infer.federated.records import Request
from fstq_infer.federated.tokens import TokenFolder, TokenScores, TokenSettings
from fstq_infer.federated.train import Example, LoraTrainer, TrainSettings
from fstq_infer.lazy import load

log = logging.getLogger(__name__)


@dataclass
class Site:
    """Everything that apps make from one configuration, each part when it is first asked for."""

    config: Config
    _trainer: LoraTrainer | None = None
    _start: Arrays = field(default_factory=dict)
    _texts: Texts | None = None
    _rows: list[Any] | None = None
    _parts: list[list[int]] = field(default_factory=list)
    _examples: dict[str, tuple[list[Example], list[Example]]] = field(default_factory=dict)

    def trainer(self) -> LoraTrainer:
        """The model with a new adapter, the same for every client: [model] seed draws it."""
        if self._trainer is None:
            import torch

            described = self.config.model
            targets: str | list[str] = described.targets
            if targets != "all-linear":
                targets = [name.strip() for name in described.targets.split(",")]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(described.seed)
                self._trainer = LoraTrainer(
                    _model(self.config), described.rank, described.alpha, targets, described.factors
                )
            self._start = self._trainer.arrays()
        return self._trainer

    def examples(self, context: Any) -> tuple[list[Example], list[Example]]:
        """(training, held-out) examples of the client that a Context is of. Raises OptionError where it has none."""
        name = client_name(context)
        if name not in self._examples:
            found = self._texts_of_model().examples(self._rows_of(name, context.node_config))
            if not found:
                raise OptionError(f"client {name} has no row of data. Give it some, or leave it out.")
            order = np.random.default_rng(self.config.data.seed).permutation(len(found))
            held = int(len(found) * self.config.data.holdout)
            self._examples[name] = [found[i] for i in order[held:]], [found[i] for i in order[:held]]
        return self._examples[name]

    def settings(self) -> TrainSettings:
        """[train] as the trainer takes it."""
        train = self.config.train
        return TrainSettings(
            train.steps, train.batch, train.accumulate, train.learning_rate, train.weight_decay, train.clip,
            train.fisher_decay, train.proximal,
        )  # fmt: skip

    @property
    def fisher(self) -> bool:
        """Whether clients' apps return their Fisher: where it is wanted, and the preset reads it."""
        return self.config.train.fisher and PRESETS.get(self.config.messages.preset, ("",))[0] in ("fisher", "paper")

    def memory(self, context: Any) -> Path:
        """Folder of what a client remembers."""
        return Path(str(context.node_config.get("fstq-memory", self.config.client.memory)))

    def tokens(self, context: Any, request: Request) -> TokenScores | None:
        """The client's token scores before a round; None where all tokens count."""
        tokens = self.config.tokens
        if tokens.keep >= 1:
            return None
        settings = TokenSettings(tokens.keep, tokens.every, tokens.decay)
        vocabulary = int(self.trainer().model.get_input_embeddings().weight.shape[0])
        return TokenFolder(self.memory(context)).load(
            client_name(context), settings, vocabulary, request.run, request.round
        )

    def mods(self, context: Any, training: bool = True) -> list[Any]:
        """Mods of training: of the downlink, fstq_mod, then those of [privacy]; evaluation has the first only."""
        client, preset = self.config.client, self.config.messages.preset
        first = list[Any]()
        if self.config.messages.downlink != "full":
            identity = self.trainer().identity
            first = [DownlinkMod(identity, self.memory(context), client_name(context), lambda: self._start)]
        if not training:
            return first
        speed, name = _uplink(client.uplink, context), client_name(context)
        ours = FstqMod(self.trainer().identity, self.memory(context), preset, name, speed)
        return check_mods([*first, ours, *privacy.mods(self.config)], preset, self.fisher)

    def _texts_of_model(self) -> Texts:
        if self._texts is None:
            data = self.config.data
            _check_folder(self.config.model.path)
            self._texts = Texts.of(self.config.model.path, data.max_tokens, data.learn == "all")
        return self._texts

    def _rows_of(self, name: str, node: Mapping[str, Any]) -> list[Any]:
        data = self.config.data
        path = str(node.get("fstq-data", data.path))
        if data.partition == "own":
            return _read(data.kind, path.replace("{client}", name))
        if self._rows is None:
            self._rows = _read(data.kind, path)
        clients = int(node.get("num-partitions", self.config.simulation.clients))
        if len(self._parts) != clients:
            self._parts = partition(self._rows, clients, data.partition, data.seed)
        index = node.get("partition-id")
        if not isinstance(index, int) or not 0 <= index < clients:
            raise ConfigError(
                f"[data] partition = {data.partition!a} needs the node's 'partition-id', from 0 to {clients - 1}, "
                f"found {index!a}. Set it with --node-config, or use partition = 'own'."
            )
        return [self._rows[i] for i in self._parts[index]]


def client_name(context: Any) -> str:
    """Names a client's files: as FstqMod does."""
    node = context.node_config
    return str(node.get("client-id", node.get("partition-id", context.node_id)))


def at_node(config: Config, node: Mapping[str, Any]) -> Config:
    """The configuration with what a node's own says of its model."""
    path = node.get("fstq-model")
    return config if path is None else replace(config, model=replace(config.model, path=str(path)))


def _read(kind: str, path: str) -> list[Any]:
    rows = read(kind, path)
    found = list(rows)
    if rows.skipped:
        log.warning("%s: %d rows were skipped", path, rows.skipped)
    return found


def _model(config: Config) -> Any:
    """The base model. Raises OptionError where there is none."""
    model = config.model
    _check_folder(model.path)
    options: dict[str, Any] = {"dtype": model.dtype, "local_files_only": True, "use_safetensors": True}
    if model.four_bit:
        bits = load("transformers:BitsAndBytesConfig", "[model] four_bit", "federated")
        load("bitsandbytes:__version__", "[model] four_bit", "federated-4bit")
        options["quantization_config"] = bits(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype
        )
        options["device_map"] = {"": model.device}
    auto = load("transformers:AutoModelForCausalLM", "training an adapter", "federated")
    try:
        found = auto.from_pretrained(model.path, **options)
    except (OSError, ValueError) as error:
        raise OptionError(f"[model] path {model.path} cannot be loaded: {error}") from error
    return found if model.four_bit else found.to(model.device)


def _check_folder(path: str) -> None:
    if not Path(path).is_dir():
        raise OptionError(f"[model] path: there is no folder {path}. Name a model's folder.")


def _uplink(setting: str, context: Any) -> Any:
    """Bytes per second, or a function that measures them, of a node; None where nothing is said."""
    node = context.node_config
    given = node.get("fstq-uplink")
    if isinstance(given, int | float):
        return float(given)
    if isinstance(given, str) and ":" in given:
        return load(given, f"'fstq-uplink' = {given!a}", "federated")
    speeds = [part.strip() for part in setting.split(",") if part.strip()]
    if given is not None or not speeds:
        if given is not None:
            raise OptionError(f"'fstq-uplink' is {given!a}, expected bytes per second, or 'module:function'")
        return None
    try:
        numbers = [float(part) for part in speeds]
    except ValueError as error:
        raise OptionError(f"[client] uplink is {setting!a}, expected numbers with commas") from error
    return numbers[int(node.get("partition-id", 0)) % len(numbers)]
