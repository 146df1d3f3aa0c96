"""Rounds with checkpoints: a federation that was cut off ends with the same bits; enough replies; deadlines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the server needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
)

from fstq_infer.errors import OptionError, StateError
from fstq_infer.federated import checkpoint as checkpoints
from fstq_infer.federated.budget import SameBudget
from fstq_infer.federated.checkpoint import Progress
from fstq_infer.federated.collect import collect
from fstq_infer.federated.flower import Result
from fstq_infer.federated.server import Rounds, federate
from fstq_infer.federated.strategy import FstqStrategy

from .flower_apps import arrays_in, make_grid, record, weights
from .samples import BASE

HALF = {"fraction_train": 0.5, "fraction_evaluate": 0.5}
INNER = {
    "FedAvg": lambda: FedAvg(**HALF),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.5, **HALF),
    "FedAdam": lambda: FedAdam(eta=0.01, **HALF),
    "FedMedian": lambda: FedMedian(**HALF),
}


class Cut(Exception):
    """The server goes away."""


def run(folder: Path, name: str, rounds: int, cut: int | None = None, resume: bool = False) -> Any:
    def evaluate(round: int, arrays: Any) -> Any:
        if round == cut:
            raise Cut  # after training: the clients are one round ahead of the checkpoint
        return MetricRecord({"sum": sum(float(values.sum()) for values in arrays_in(arrays).values())})

    strategy = FstqStrategy(INNER[name](), BASE, SameBudget(700), run="run")
    grid = make_grid(folder / "clients", "fstq", clients=6, exact=False, fisher=True)
    settings = Rounds(rounds, seed=3, checkpoint=folder / "server.safetensors", resume=resume)
    return federate(strategy, grid, record(weights()), settings, evaluate_fn=evaluate)


@pytest.mark.parametrize("name", INNER)
def test_resumed_is_the_same_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = run(tmp_path / "whole", name, 4)
    random.seed(99)  # what else the process draws plays no part
    with pytest.raises(Cut):
        run(tmp_path / "cut", name, 4, cut=3)
    ours = run(tmp_path / "cut", name, 4, resume=True)
    for key, values in arrays_in(whole.arrays).items():
        assert values.tobytes() == ours.arrays[key].numpy().tobytes()
    for history in checkpoints.HISTORIES:
        assert getattr(whole, history) == getattr(ours, history)
    assert (tmp_path / "whole/server.safetensors").read_bytes() == (tmp_path / "cut/server.safetensors").read_bytes()


def test_resuming_where_nothing_is_left_to_do_or_nothing_was_done(tmp_path: Path) -> None:
    first = run(tmp_path, "FedAvg", 2, resume=True)
    again = run(tmp_path, "FedAvg", 2, resume=True)
    assert again.train_metrics_clientapp == first.train_metrics_clientapp and len(again.arrays) == 3
    with pytest.raises(StateError, match="exists already"):
        run(tmp_path, "FedAvg", 3)
    with pytest.raises(StateError, match="FedMedian"):
        run(tmp_path, "FedMedian", 3, resume=True)


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "server.safetensors"
    strategy = FstqStrategy(FedAvg(), BASE)
    checkpoints.save(path, strategy, Progress(3, record(weights()), Result()), 1)
    assert checkpoints.load(path, FstqStrategy(FedAvg(), BASE), 1).round == 3
    for other, seed, match in (
        (FstqStrategy(FedAvg(), BASE), 2, "seed 1"),
        (FstqStrategy(FedAvg(), bytes(16)), 1, "base model"),
        (FedAvg(), 1, "strategies"),
    ):
        with pytest.raises(StateError, match=match):
            checkpoints.load(path, other, seed)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateError, match="damaged"):
        checkpoints.load(path, strategy, 1)
    path.write_bytes(content[:100])
    with pytest.raises(StateError, match="damaged"):
        checkpoints.load(path, strategy, 1)


def test_adaptive_clipping_norm_is_kept_and_an_accountant_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "server.safetensors", Progress(1, record(weights()), Result())
    wrapped = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, 4)
    wrapped.clipping_norm = 0.321
    checkpoints.save(path, FstqStrategy(wrapped, BASE), state, 0)
    fresh = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, 4)
    checkpoints.load(path, FstqStrategy(fresh, BASE), 0)
    assert fresh.clipping_norm == 0.321
    wrapped.accountant = object()
    with pytest.raises(StateError, match="privacy"):
        checkpoints.save(path, FstqStrategy(wrapped, BASE), state, 0)


class SlowGrid:
    """Replies of node n arrive n seconds after they were asked for; node 9 answers with nothing, ever."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, dict[str, Any]()

    def push_messages(self, messages: Any) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(message.metadata.dst_node_id)
            self.asked[message.metadata.message_id] = message
        return list(self.asked)

    def pull_messages(self, ids: Any) -> list[Any]:
        there = [id for id in ids if id != "9" and int(id) <= self.now]
        return [Message(RecordDict({"arrays": ArrayRecord()}), reply_to=self.asked.pop(id)) for id in there]

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("timeout", "enough", "nodes", "ends"),
    [(100, None, {2, 3, 5}, 5.0), (100, 2, {2, 3}, 3.0), (4, None, {2, 3}, 4.0), (1, 2, set(), 1.0)],
)
def test_enough_replies_or_the_deadline(timeout: float, enough: int | None, nodes: set[int], ends: float) -> None:
    make_grid(Path("unused"))
    grid = SlowGrid()
    asked = [Message(RecordDict(), node, "train") for node in ((2, 3, 5) if timeout == 100 else (2, 3, 5, 9))]
    replies = collect(grid, asked, timeout, enough, clock=lambda: grid.now, sleep=grid.sleep)
    assert {reply.metadata.src_node_id for reply in replies} == nodes
    assert grid.now == pytest.approx(ends)


def test_a_round_with_enough_replies_goes_on_and_lost_updates_come_back(tmp_path: Path) -> None:
    """Node 3's replies of round 1 are lost: it learns so, and its next message holds both updates."""
    lost = [True]

    def fault(reply: Any) -> Any:
        if reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train" and lost:
            lost.clear()
            return None
        return reply

    strategy = FstqStrategy(FedAvg(fraction_evaluate=0.0), BASE, SameBudget(2500))
    grid = make_grid(tmp_path, "fstq", fault=fault)
    result = federate(strategy, grid, record(weights()), Rounds(2, enough=3, timeout=5))
    assert [metrics["fstq-used"] for metrics in result.train_metrics_clientapp.values()] == [3, 4]
    assert strategy.heard == {2: 2, 3: 2, 4: 2, 5: 2}
    assert all(np.isfinite(values).all() for values in arrays_in(result.arrays).values())


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 1, "enough": 0}, {"rounds": 1, "resume": True}])
def test_bad_settings(options: Any) -> None:
    with pytest.raises(OptionError):
        Rounds(**options)
