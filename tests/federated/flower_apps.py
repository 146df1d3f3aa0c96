"""A ClientApp and a Grid for tests: training is arithmetic that can be done by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fstq_infer.federated.local import LocalGrid
from fstq_infer.federated.mod import FstqMod

from .samples import BASE

SHAPES = {"layer.0.lora_A": (8, 40), "layer.0.lora_B": (60, 8), "layer.1.lora_A": (8, 40)}
Arrays = dict[str, np.ndarray]


def weights(seed: int = 0) -> Arrays:
    """Multiples of 2^-12 below 1, so that sums and differences of a few rounds are exact in float32."""
    rng = np.random.default_rng(seed)
    return {name: (rng.integers(-4096, 4096, shape) / 4096).astype(np.float32) for name, shape in SHAPES.items()}


def record(arrays: Mapping[str, np.ndarray]) -> Any:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def arrays_in(content: Any) -> Arrays:
    return {name: array.numpy() for name, array in content.items()}


def step(seed: int, client: int, round: int) -> Arrays:
    """What training adds on one client in one round: multiples of 2^-12, mostly small, none of them -0."""
    rng = np.random.default_rng((seed, client, round))
    return {name: (np.round(rng.standard_t(3, shape) * 40) / 4096 + 0.0).astype(np.float32)
            for name, shape in SHAPES.items()}  # fmt: skip


def make_app(mods: Sequence[Any], fisher: bool = False, seed: int = 0, exact: bool = True) -> Any:
    """A ClientApp that adds :func:`step`; not exact: whose steps are no round numbers."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Any, context: Any) -> Any:
        client, config = context.node_config["partition-id"], message.content["config"]
        moved = step(seed, client, config["server-round"])
        if not exact:
            moved = {name: (values * np.float32(0.3137)).astype(np.float32) for name, values in moved.items()}
        held = arrays_in(message.content["arrays"])
        content = {
            "arrays": record({name: values + moved[name] for name, values in held.items()}),
            "metrics": MetricRecord({"num-examples": (1, 1, 2, 4)[client % 4], "loss": 1.0 + client}),
        }
        if fisher:
            content["fstq-fisher"] = record({name: np.square(values) for name, values in moved.items()})
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        total = sum(float(values.sum()) for values in arrays_in(message.content["arrays"]).values())
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "total": total})}), reply_to=message)

    return app


def make_grid(folder: Path, preset: str = "lossless", clients: int = 4, **options: Any) -> LocalGrid:
    fault = options.pop("fault", None)
    return LocalGrid(make_app([FstqMod(BASE, folder, preset)], **options), clients, fault=fault)
