"""A ClientApp that trains a LoRA adapter and answers with one compressed message; the data are the user's.

>>> app = client_app(trainer, examples, TrainSettings(), mods=[FstqMod(base=trainer.identity, memory="state")])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fstq_infer.federated.flower import Array, ArrayRecord, Message, MetricRecord, RecordDict
from fstq_infer.federated.order import check_mods
from fstq_infer.federated.records import FISHER, arrays_of
from fstq_infer.federated.tokens import TokenScores
from fstq_infer.federated.train import Example, LoraTrainer, TrainSettings


def client_app(
    trainer: Callable[[Any], LoraTrainer],
    examples: Callable[[Any], Sequence[Example]],
    settings: TrainSettings,
    mods: Sequence[Any] = (),
    preset: str = "fstq",
    fisher: bool = True,
    seed: int = 0,
) -> Any:
    """trainer, examples: what belongs to a node, by its Context; called for every message, so let them keep things.

    mods: of training, in order; an unsound one raises PrivacyOrderError. preset: of the fstq_mod among them. fisher:
    give the mod the parameter Fisher of each round. A server's FedProx is followed.
    """
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train(mods=check_mods(mods, preset, fisher))  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        return train_reply(message, context, trainer(context), examples(context), settings, fisher, seed)

    @app.evaluate()  # type: ignore[untyped-decorator]
    def evaluate(message: Any, context: Any) -> Any:
        return evaluate_reply(message, trainer(context), examples(context), settings.batch)

    return app


def train_reply(
    message: Any,
    context: Any,
    trainer: LoraTrainer,
    rows: Sequence[Example],
    settings: TrainSettings,
    fisher: bool = True,
    seed: int = 0,
    tokens: TokenScores | None = None,
) -> Any:
    """Train from the message's weights; the reply holds the new ones, metrics, and the Fisher if wanted.

    tokens: this client's token mask, which learns from the round. The metric ``tokens`` is the share that it has left.
    """
    config: Any = next(iter(message.content.config_records.values()), {})
    held = next(iter(message.content.array_records.items()))
    trainer.load(arrays_of(held[1]))
    node = int(context.node_config.get("partition-id", context.node_id)) % (1 << 63)
    work = replace(settings, proximal=float(config.get("proximal-mu", settings.proximal)))
    done = trainer.train(rows, work, (seed, node, int(config.get("server-round", 0))), tokens)
    metrics = MetricRecord({"num-examples": done.examples, "loss": done.loss})
    if tokens is not None:
        metrics["tokens"] = done.kept
    content = {held[0]: _record(done.arrays), "metrics": metrics}
    if fisher:
        content[FISHER] = _record(done.fisher)
    return Message(RecordDict(content), reply_to=message)


def evaluate_reply(message: Any, trainer: LoraTrainer, rows: Sequence[Example], batch: int) -> Any:
    """The loss of the message's weights on some rows."""
    trainer.load(arrays_of(next(iter(message.content.array_records.values()))))
    metrics = MetricRecord({"num-examples": len(rows), "loss": trainer.loss(rows, batch)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _record(arrays: dict[str, Any]) -> Any:
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})
