"""The configuration of a federation, from TOML or from Flower's run configuration; docs/federated.md lists the keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fstq_infer.errors import ConfigError
from fstq_infer.federated.app.schema import build, choice, number
from fstq_infer.federated.app.tables import nested, read_toml

PRESETS = ("fstq", "mosaic", "top-k", "paper", "lossless")
DOWNLINKS = ("full", "fstq", "top-k", "lossless")
PRIVACY = ("none", "server-fixed", "server-adaptive", "client-fixed", "client-adaptive", "local", "secagg")
PATHS = (("model", "path"), ("data", "path"), ("output", "folder"), ("client", "memory"))
DEFAULTS = {"client": "client-state", "output": "federation-out"}
SCALARS = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Model:
    """path: folder of a Hugging Face causal language model. targets: ``all-linear``, or module names with commas.
    factors: ``B`` trains and exchanges B only. four_bit: load the base model in 4 bits (bitsandbytes)."""

    path: str
    rank: int = number(8, least=1, most=4096)
    alpha: int = number(16, least=1)
    targets: str = "all-linear"
    factors: str = choice("AB", ("AB", "B"))
    dtype: str = choice("float32", ("float32", "bfloat16"))
    four_bit: bool = False
    device: str = "cpu"
    seed: int = number(0, least=0)


@dataclass(frozen=True, slots=True)
class Data:
    """path: file of all rows, shared by ``partition``; with partition ``own`` the file of one client, in which
    ``{client}`` stands for its name. holdout: share of a client's rows that it evaluates on and never trains on."""

    path: str
    kind: str = "jsonl"
    partition: str = "iid"
    seed: int = number(0, least=0)
    max_tokens: int = number(256, least=2)
    learn: str = choice("answer", ("answer", "all"))
    holdout: float = number(0.1, least=0, below=1)


@dataclass(frozen=True, slots=True)
class Train:
    """As train.TrainSettings; fisher: weigh coordinates by the Fisher of parameters."""

    steps: int = number(10, least=1)
    batch: int = number(8, least=1)
    accumulate: int = number(1, least=1)
    learning_rate: float = number(1e-3, above=0)
    weight_decay: float = number(0.0, least=0)
    clip: float = number(1.0, above=0)
    proximal: float = number(0.0, least=0)
    fisher: bool = True
    fisher_decay: float = number(0.9, least=0, below=1)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which tokens a loss is taken of: the share ``keep`` with the highest embedding scores; 1 is all of them."""

    keep: float = number(1.0, above=0, most=1)
    every: int = number(10, least=1)
    decay: float = number(0.9, least=0, below=1)


@dataclass(frozen=True, slots=True)
class Messages:
    """preset: of compress.PRESETS. Uplink budgets: ``bytes`` for all alike, or what ``seconds`` carry at a client's
    reported bytes per second (``assumed`` where it has reported none), from ``lowest`` to ``highest``. senders: with
    fewer mosaic messages in a round its step is smaller. downlink: whole
    weights, or by a preset what has changed since those that a client holds, in ``downlink_bytes`` but for lossless;
    a client that has missed more than ``downlink_history`` changes gets whole weights. downlink_start: first
    weights are ``sent``, or ``drawn`` by each client from [model] seed as the server does it."""

    preset: str = choice("fstq", PRESETS)
    bytes: int | None = number(None, least=256)
    seconds: float = number(1.0, above=0)
    assumed: float = number(50_000.0, above=0)
    lowest: int = number(1_024, least=256)
    highest: int = number(1 << 24, least=256)
    max_norm: float | None = number(None, above=0)
    senders: int | None = number(None, least=1)
    downlink: str = choice("full", DOWNLINKS)
    downlink_bytes: int = number(65_536, least=256)
    downlink_history: int = number(8, least=1, most=1024)
    downlink_start: str = choice("sent", ("sent", "drawn"))


@dataclass(frozen=True, slots=True)
class Server:
    """strategy: name of one of Flower's; the table [strategy] holds its arguments. enough: good replies after which a
    round goes on. timeout: seconds after which it goes on whatever has come. average: exponent of a running mean of the
    weights that is saved in place of the last ones."""

    strategy: str = "FedAvg"
    rounds: int = number(10, least=1)
    seed: int = number(0, least=0)
    enough: int | None = number(None, least=1)
    timeout: float = number(3600.0, above=0)
    average: float | None = number(None, least=0)
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """What may differ from client to client: a SuperNode's --node-config goes before it (``fstq-memory``,
    ``fstq-uplink``, ``fstq-data``, ``fstq-model``). uplink: bytes per second; several with commas go round."""

    memory: str = DEFAULTS["client"]
    uplink: str = ""


@dataclass(frozen=True, slots=True)
class Privacy:
    """kind: whose clipping, whose noise. Keys beside it are those of Flower's wrapper or mod of that kind."""

    kind: str = choice("none", PRIVACY)
    noise_multiplier: float = number(1.0, least=0)
    clipping_norm: float = number(0.1, above=0)
    clients: int | None = number(None, least=1)
    sensitivity: float = number(0.1, above=0)
    epsilon: float = number(8.0, above=0)
    delta: float = number(1e-5, above=0, below=1)


@dataclass(frozen=True, slots=True)
class Simulation:
    """clients: number of clients on this machine. grid: ``local`` (one after the other in this process), or ``ray``."""

    clients: int = number(4, least=1, most=100_000)
    grid: str = choice("local", ("local", "ray"))
    cpus: int = number(1, least=1)


@dataclass(frozen=True, slots=True)
class Output:
    """folder: of checkpoint, log and adapters. save_every: rounds between two adapters; 0: the last one only. sinks:
    besides the JSON lines: tensorboard, wandb, mlflow, with commas."""

    folder: str = DEFAULTS["output"]
    save_every: int = number(5, least=0)
    sinks: str = ""
    project: str = "fstq"


@dataclass(frozen=True, slots=True)
class Config:
    """One table for each section. strategy: arguments of the inner strategy, such as fraction_train."""

    model: Model
    data: Data
    train: Train
    tokens: Tokens
    messages: Messages
    server: Server
    client: Client
    privacy: Privacy
    simulation: Simulation
    output: Output
    strategy: Mapping[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """``section.key`` to value, as Flower's run configuration holds it; keys without a value are left out."""
        return {
            f"{section}.{key}": value
            for section, table in dataclasses.asdict(self).items()
            for key, value in table.items()
            if value is not None
        }


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file: its tables, or ``[tool.flwr.app.config]`` of a pyproject.toml. Relative paths are from there.

    changes: ``section.key`` to value, in place of the file's, with paths as they are. Raises ConfigError with file and
    key.
    """
    path = Path(path)
    tables: Any = read_toml(path)
    where = str(path)
    if path.name == "pyproject.toml":
        where = f"{path}: [tool.flwr.app.config]"
        for key in ("tool", "flwr", "app", "config"):
            tables = tables.get(key, {}) if isinstance(tables, dict) else {}
        if not isinstance(tables, dict):
            raise ConfigError(f"{where} is {tables!a}, expected tables of keys and values.")
    merged = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    for section, key in PATHS:
        held = merged.setdefault(section, {})
        if not isinstance(held, dict):
            continue
        if section in DEFAULTS:
            held.setdefault(key, DEFAULTS[section])
        if isinstance(held.get(key), str) and not (section == "data" and held.get("kind") == "hub"):
            held[key] = str(path.parent / held[key])
    for section, table in nested(changes or {}, "--set").items():
        held = merged.get(section, {})
        merged[section] = {**held, **table} if isinstance(held, dict) else held
    return _checked(merged, where)


def from_flower(settings: Mapping[str, Any]) -> Config:
    """From a run configuration (Context.run_config). Raises ConfigError."""
    return _checked(nested(settings, "the run's configuration"), "[tool.flwr.app.config]")


def _checked(tables: Mapping[str, Any], where: str) -> Config:
    from fstq_infer.federated.app.inner import check_arguments, check_mosaic

    config = build(Config, tables, where)
    for key, value in config.strategy.items():
        if type(value) not in SCALARS:
            raise ConfigError(f"{where}: [strategy] {key} is {value!a}, expected text, a number, true or false.")
    check_arguments(config.server.strategy, config.strategy, where)
    if config.messages.preset == "mosaic":
        check_mosaic(config.server.strategy, where)
    if config.messages.lowest > config.messages.highest:
        raise ConfigError(f"{where}: [messages] lowest is above highest, expected the other way round.")
    return config
