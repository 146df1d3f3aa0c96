"""The inner strategies by name, and their arguments from a configuration, checked before anything runs."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from fstq_infer.errors import ConfigError, OptionError, suggestion
from fstq_infer.federated.order import mosaic_reason
from fstq_infer.lazy import load

STRATEGIES: Mapping[str, str] = {
    name: f"flwr.serverapp.strategy:{name}"
    for name in (
        "FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedProx", "FedMedian", "FedTrimmedAvg", "Krum",
        "MultiKrum", "Bulyan", "QFedAvg",
    )
}  # fmt: skip
OURS = ("weighted_by_key", "arrayrecord_key", "configrecord_key")  # what the apps here agree on
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"QFedAvg": {"train_loss_key": "loss"}}
SCALARS = (bool, int, float, str)


def make(name: str, arguments: Mapping[str, Any]) -> Any:
    """A strategy of Flower's. Raises OptionError for arguments that it refuses."""
    try:
        return _class(name)(**{**DEFAULTS.get(name, {}), **arguments})
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} refuses its arguments {dict(arguments)}: {error}") from error


def check_arguments(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an unknown strategy, an argument that it does not have, or one of another type."""
    if name not in STRATEGIES:
        raise ConfigError(f"{where}: [server] strategy is {name!a}; {suggestion(name, STRATEGIES)}")
    cls = _class(name)
    kinds = typing.get_type_hints(cls.__init__)
    known = {
        key: _scalars(kinds.get(key, str))
        for key in inspect.signature(cls).parameters
        if key not in OURS and not key.endswith("_fn")
    }
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"{where}: [strategy] has an unknown key {key!a} for {name}; {suggestion(key, known)}")
        kind = known[key]
        if type(value) not in kind and not (float in kind and type(value) is int):
            names = " or ".join(part.__name__ for part in kind)
            raise ConfigError(f"{where}: [strategy] {key} is {value!a}, expected {names} for {name}.")


def accepted(name: str, key: str) -> bool:
    """Whether a strategy has an argument of that name."""
    return key in inspect.signature(_class(name)).parameters


def check_mosaic(name: str, where: str) -> None:
    """Raises ConfigError for a strategy with which mosaic messages are not sound."""
    if reason := mosaic_reason(_class(name)):
        raise ConfigError(f"{where}: [messages] preset is 'mosaic', but {reason}")


def _class(name: str) -> Any:
    return load(STRATEGIES[name], "federated fine-tuning", "federated")


def _scalars(kind: Any) -> tuple[type, ...]:
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    parts = typing.get_args(kind) if union else (kind,)
    return tuple(part for part in parts if part in SCALARS)
