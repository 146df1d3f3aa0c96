"""The server of a configured federation: strategy, rounds, adapters saved on the way, figures of each round."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fstq_infer.atomic import atomic_directory
from fstq_infer.errors import FstqError, StateError
from fstq_infer.federated.app import inner, privacy
from fstq_infer.federated.app.config import Config
from fstq_infer.federated.app.sinks import Figures, open_sinks
from fstq_infer.federated.app.site import Site
from fstq_infer.federated.budget import SameBudget, UplinkBudgets
from fstq_infer.federated.downlink import Downlink
from fstq_infer.federated.flower import Array, ArrayRecord
from fstq_infer.federated.records import arrays_of
from fstq_infer.federated.server import Report, Rounds, federate
from fstq_infer.federated.strategy import Budgets, FstqStrategy

log = logging.getLogger(__name__)
CHECKPOINT, ADAPTER = "server.safetensors", "adapter"
Progress = Callable[[int, Figures], None]


def strategy_of(config: Config, base: bytes) -> FstqStrategy:
    """FstqStrategy around what [server], [strategy] and [privacy] describe."""
    wrapped = privacy.wrapped(inner.make(config.server.strategy, config.strategy), config)
    private = privacy.central(config)
    return FstqStrategy(
        wrapped,
        base,
        budgets_of(config),
        max_norm=config.messages.max_norm,
        uniform=private,
        least=config.privacy.clients or 0 if private else 0,
        downlink=downlink_of(config),
        senders=config.messages.senders,
    )


def downlink_of(config: Config) -> Downlink | None:
    """[messages] downlink; None where weights are sent whole."""
    messages = config.messages
    if messages.downlink == "full":
        return None
    drawn = messages.downlink_start == "drawn"
    return Downlink(messages.downlink, messages.downlink_bytes, messages.downlink_history, drawn)


def budgets_of(config: Config) -> Budgets:
    """[messages]: no limit for the lossless preset, the same bytes for all, or what each uplink carries."""
    messages = config.messages
    if messages.preset == "lossless":
        return SameBudget(0)
    if messages.bytes is not None:
        return SameBudget(messages.bytes)
    return UplinkBudgets(messages.seconds, messages.assumed, {}, messages.lowest, messages.highest)


def serve(site: Site, grid: Any, resume: bool = False, progress: Progress | None = None) -> Any:
    """Run all rounds and return Flower's Result. Raises StateError where no round had a reply that could be used."""
    config, trainer = site.config, site.trainer()
    folder = Path(config.output.folder)
    start = ArrayRecord({name: Array(values) for name, values in trainer.arrays().items()})
    strategy = strategy_of(config, trainer.identity)
    server = config.server
    rounds = Rounds(
        server.rounds, server.seed, server.timeout, server.enough, folder / CHECKPOINT, resume or server.resume,
        server.average,
    )  # fmt: skip
    sinks = open_sinks(folder, config.output.sinks, config.output.project, config.flat())
    used = list[int]()

    def after(report: Report) -> None:
        figures = figures_of(report, strategy.sent)
        used.append(int(figures["used"] or 0))
        for sink in sinks:
            sink.write(report.round, figures)
        every = config.output.save_every
        if every and report.round % every == 0:
            save_adapter(site, report.arrays, folder / f"{ADAPTER}-{report.round:04d}")
        if progress is not None:
            progress(report.round, figures)

    try:
        result = federate(strategy, grid, start, rounds, on_round=after)
    finally:
        for sink in sinks:
            sink.close()
    if used and not any(used):
        kinds = ", ".join(f"{kind} {count}" for kind, count in strategy.refused.most_common()) or "no reply came"
        raise StateError(f"no round had a reply that could be used ({kinds}). The log above says why of each.")
    save_adapter(site, result.arrays, folder / ADAPTER)
    return result


def figures_of(report: Report, sent: int) -> dict[str, float | int | None]:
    """What is logged of a round. dropped: clients asked that gave no good reply. bytes are those of weights and
    messages, without Flower's own."""
    train, evaluated = dict(report.train or {}), dict(report.evaluated or {})
    used = int(train.get("fstq-used", 0))
    return {
        "seconds": round(report.seconds, 3),
        "clients": report.asked,
        "used": used,
        "dropped": report.asked - used,
        "refused": int(train.get("fstq-refused", 0)),
        "bytes_up": int(train.get("fstq-bytes", 0)),
        "bytes_down": sent,
        "loss": train.get("loss"),
        "held_out_loss": evaluated.get("loss"),
        **{key.removeprefix("fstq-"): value for key, value in train.items() if key.startswith("fstq-refused-")},
    }


def save_adapter(site: Site, arrays: Any, path: Path) -> None:
    """Write PEFT's files in place of an earlier adapter. Raises StateError where they cannot be written."""
    trainer = site.trainer()
    trainer.load(arrays_of(arrays))
    try:
        with atomic_directory(path, overwrite=True, marker="adapter_config.json") as folder:
            trainer.save(folder)
    except FstqError as error:
        raise StateError(f"the adapter cannot be saved: {error}") from error
