"""FstqStrategy around Flower's strategies, with real mods and messages: equal to uncompressed, and hard to harm."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="the strategy needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
)

from fstq_infer.errors import OptionError
from fstq_infer.federated.budget import OVERHEAD, SameBudget, UplinkBudgets
from fstq_infer.federated.compress import Compressor
from fstq_infer.federated.local import LocalGrid
from fstq_infer.federated.mod import FstqMod
from fstq_infer.federated.records import Request, pack, unpack
from fstq_infer.federated.strategy import FstqStrategy
from fstq_infer.federated.tensors import TensorManifest

from .flower_apps import SHAPES, arrays_in, make_app, make_grid, record, step, weights
from .samples import BASE

MANIFEST = TensorManifest.of(weights())
STRATEGIES: dict[str, Callable[..., Any]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda **options: FedAvgM(server_learning_rate=0.5, server_momentum=0.5, **options),
    "FedAdam": lambda **options: FedAdam(eta=0.01, **options),
    "FedYogi": lambda **options: FedYogi(eta=0.01, **options),
    "FedProx": lambda **options: FedProx(proximal_mu=0.1, **options),
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
}


class InOrder(LocalGrid):
    """Replies in the order of nodes: FstqStrategy sums in that order, and so must what it is compared with."""

    def pull_messages(self, message_ids: Any) -> Any:
        return sorted(super().pull_messages(message_ids), key=lambda reply: reply.metadata.src_node_id)


def both(tmp_path: Path, name: str, rounds: int, exact: bool) -> tuple[Any, Any]:
    """(arrays without compression, arrays with the lossless codec) after some rounds of the same training."""
    random.seed(0)
    plain = STRATEGIES[name]().start(InOrder(make_app([], exact=exact), 4), record(weights()), rounds)
    random.seed(0)
    wrapped = FstqStrategy(STRATEGIES[name](), BASE, SameBudget(0))
    ours = wrapped.start(make_grid(tmp_path, exact=exact), record(weights()), rounds)
    assert wrapped.refused.total() == 0
    assert dict(plain.evaluate_metrics_clientapp[1]).keys() == dict(ours.evaluate_metrics_clientapp[1]).keys()
    return arrays_in(plain.arrays), arrays_in(ours.arrays)


@pytest.mark.parametrize("name", STRATEGIES)
def test_lossless_equals_uncompressed_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Where new - old is exact in float32, so is old + (new - old)."""
    plain, ours = both(tmp_path, name, 1, exact=True)
    assert all(np.array_equal(plain[key], ours[key]) for key in SHAPES)
    assert any(not np.array_equal(ours[key], weights()[key]) for key in SHAPES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_lossless_equals_uncompressed_within_rounding(tmp_path: Path, name: str) -> None:
    """Three rounds from steps that are no round numbers. A delta is rounded once, its sum once: an ulp or two of values
    near 1; the adaptive strategies divide by small numbers, which magnifies that."""
    plain, ours = both(tmp_path, name, 3, exact=False)
    tolerance = 1e-4 if name in ("FedAdam", "FedYogi") else 1e-6
    for key in SHAPES:
        np.testing.assert_allclose(ours[key], plain[key], rtol=0, atol=tolerance)


def test_one_round_of_averaging_by_hand(tmp_path: Path) -> None:
    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0))
    found = arrays_in(strategy.start(make_grid(tmp_path), record(weights()), 1).arrays)
    for name in SHAPES:
        steps = [step(0, client, 1)[name] for client in range(4)]
        expected = weights()[name] + (steps[0] + steps[1] + 2 * steps[2] + 4 * steps[3]) / 8
        np.testing.assert_array_equal(found[name], expected)


def test_compressed_training_moves_the_same_way(tmp_path: Path) -> None:
    """12 rounds at a tenth of the bytes: what was held back arrives later, so the sums stay close."""
    rounds, strategy = 12, FstqStrategy(FedAvg(), BASE, SameBudget(600))
    grid = make_grid(tmp_path, "fstq", fisher=True)
    result = strategy.start(grid, record(weights()), rounds)
    plain = FedAvg().start(LocalGrid(make_app([]), 4), record(weights()), rounds)
    moved = MANIFEST.flatten(arrays_in(result.arrays)) - MANIFEST.flatten(weights())
    wanted = MANIFEST.flatten(arrays_in(plain.arrays)) - MANIFEST.flatten(weights())
    assert np.corrcoef(moved, wanted)[0, 1] > 0.8
    for metrics in result.train_metrics_clientapp.values():
        assert metrics["fstq-used"] == 4 and metrics["fstq-refused"] == 0 and metrics["fstq-bytes"] <= 4 * 600
        assert metrics["loss"] == (1 + 2 + 2 * 3 + 4 * 4) / 8


def test_server_side_privacy_wrapper_inside(tmp_path: Path) -> None:
    """Clipping sees absolute weights: a norm of 0.01 leaves updates of 0.01 at most, and no noise is asked for."""
    inner = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 0.01, 4)
    found = FstqStrategy(inner, BASE, SameBudget(600)).start(make_grid(tmp_path, "fstq"), record(weights()), 1)
    moved = MANIFEST.flatten(arrays_in(found.arrays)) - MANIFEST.flatten(weights())
    assert 0 < np.linalg.norm(moved) < 0.0101


def test_noise_needs_equal_weights_and_enough_clients(tmp_path: Path) -> None:
    """uniform: a client that says 4 examples weighs as much as one that says 1; least: a short round is no round."""
    uniform = FstqStrategy(FedAvg(), BASE, SameBudget(0), uniform=True)
    found = uniform.start(make_grid(tmp_path / "a"), record(weights()), 1)
    moved = [MANIFEST.flatten(step(0, client, 1)) for client in range(4)]
    expected = MANIFEST.flatten(weights()) + np.mean(moved, axis=0, dtype=np.float64)
    np.testing.assert_allclose(MANIFEST.flatten(arrays_in(found.arrays)), expected, atol=1e-6)

    def fault(reply: Any) -> Any:
        return None if reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train" else reply

    short = FstqStrategy(FedAvg(fraction_evaluate=0.0), BASE, SameBudget(0), least=4)
    found = short.start(make_grid(tmp_path / "b", fault=fault), record(weights()), 1)
    metrics = found.train_metrics_clientapp[1]
    assert (metrics["fstq-used"], metrics["fstq-refused-TooFewError"]) == (0, 3) and len(found.arrays) == 0
    assert set(short.heard.values()) == {0}  # clients put their messages back


def test_server_side_privacy_wrapper_outside_fails_at_once(tmp_path: Path) -> None:
    """It would clip compressed bytes; their serialization type keeps it from doing so."""
    outer = DifferentialPrivacyServerSideFixedClipping(FstqStrategy(FedAvg(), BASE, SameBudget(600)), 0.0, 0.01, 4)
    with pytest.raises(TypeError, match="fstq"):
        outer.start(make_grid(tmp_path, "fstq"), record(weights()), 1)


def test_client_side_clipping_with_a_lossy_codec_costs_every_reply(tmp_path: Path) -> None:
    inner = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.0, 0.01, 4)
    strategy = FstqStrategy(inner, BASE, SameBudget(600))
    result = strategy.start(make_grid(tmp_path, "fstq"), record(weights()), 1)
    assert strategy.refused == {"ClientError": 4} and len(result.arrays) == 0


# What can happen to one reply: name -> (change of the reply, kind counted). A change may return None: lost.
def _blob(change: Callable[[bytes], bytes]) -> Callable[[Any], Any]:
    def apply(reply: Any) -> Any:
        reply.content["arrays"] = pack(change(unpack(reply.content)))
        return reply

    return apply


def _metrics(**values: Any) -> Callable[[Any], Any]:
    def apply(reply: Any) -> Any:
        held = {**dict(reply.content["metrics"]), **values}
        reply.content["metrics"] = MetricRecord({name: value for name, value in held.items() if value is not None})
        return reply

    return apply


def _other(base: bytes = BASE, round: int = 1, scale: float = 1.0, names: str = "") -> Callable[[Any], Any]:
    delta = {name + names: values * np.float32(scale) for name, values in step(0, 0, 1).items()}
    codec = Compressor.preset("lossless", TensorManifest.of(delta), base)
    return _blob(lambda _: codec.compress(delta, round=round)[0])


def _plain(reply: Any) -> Any:
    reply.content["arrays"] = record(weights())
    return reply


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cut": (_blob(lambda blob: blob[:-3]), "MessageTruncatedError"),
    "empty": (_blob(lambda blob: b""), "MessageTruncatedError"),
    "longer": (_blob(lambda blob: blob + b"\0"), "MessageTrailingError"),
    "flipped": (_blob(lambda blob: blob[:80] + bytes([blob[80] ^ 1]) + blob[81:]), "MessageChecksumError"),
    "noise": (_blob(lambda blob: bytes(range(200))), "MessageFormatError"),
    "stale": (_other(round=7), "MessageRoundError"),
    "wrong model": (_other(base=bytes(16)), "MessageModelError"),
    "wrong tensors": (_other(names=".x"), "MessageManifestError"),
    "huge": (_other(scale=1e9), "MessageValueError"),
    "uncompressed": (_plain, "ReplyError"),
    "no weight": (_metrics(**{"num-examples": None}), "ReplyError"),
    "negative weight": (_metrics(**{"num-examples": -5}), "ReplyError"),
    "enormous weight": (_metrics(**{"num-examples": 1e308}), "ReplyError"),
    "no number": (_metrics(**{"num-examples": float("nan")}), "ReplyError"),
    "list weight": (_metrics(**{"num-examples": [1, 2]}), "ReplyError"),
    "other metrics": (_metrics(more=1.0), "ReplyError"),
    "lists of metrics": (_metrics(loss=[1.0, 2.0]), "ReplyError"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("inner", ["FedAvg", "FedMedian"])
def test_a_bad_reply_costs_that_client_only(tmp_path: Path, name: str, inner: str) -> None:
    change, kind = FAULTS[name]

    def fault(reply: Any) -> Any:
        return change(reply) if reply.metadata.src_node_id == 3 and reply.metadata.message_type == "train" else reply

    strategy = FstqStrategy(STRATEGIES[inner](), BASE, SameBudget(0), max_norm=100.0)
    result = strategy.start(make_grid(tmp_path, fault=fault), record(weights()), 1)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["fstq-used"], metrics["fstq-refused"], metrics[f"fstq-refused-{kind}"]) == (3, 1, 1)
    assert strategy.heard == {2: 1, 3: 0, 4: 1, 5: 1} and strategy.refused == {kind: 1}
    for key in SHAPES:
        steps = [step(0, client, 1)[key] for client in (0, 2, 3)]
        mean = np.median(steps, axis=0) if inner == "FedMedian" else (steps[0] + 2 * steps[1] + 4 * steps[2]) / 7
        np.testing.assert_allclose(result.arrays[key].numpy(), weights()[key] + mean, atol=3e-7)


def test_twice_the_same_reply_and_one_from_a_stranger() -> None:
    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0))
    grid = LocalGrid(lambda *_: None, 2)
    config = ConfigRecord()
    first, second = strategy.configure_train(1, record(weights()), config, grid)
    blob, _ = Compressor.preset("lossless", MANIFEST, BASE).compress(step(0, 0, 1), round=1)

    def reply(request: Any) -> Any:
        content = RecordDict({"arrays": pack(blob), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=request)

    stranger = Message(RecordDict({"arrays": record(weights())}), 77, "train")
    arrays, metrics = strategy.aggregate_train(1, [reply(first), reply(first), reply(second), reply(stranger)])
    assert metrics["fstq-used"] == 2 and metrics["fstq-refused-ReplyError"] == 2
    assert arrays is not None and dict(config) == {"server-round": 1}


def test_nothing_usable_is_a_round_without_result(tmp_path: Path) -> None:
    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0))
    result = strategy.start(make_grid(tmp_path, fault=lambda reply: None), record(weights()), 1)
    assert result.train_metrics_clientapp[1] == {"fstq-used": 0, "fstq-refused": 0, "fstq-bytes": 0}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400), st.integers(0, 3000), st.booleans())
def test_no_bytes_break_a_round(noise: bytes, at: int, valid: bool) -> None:
    """Whatever arrives in place of a message, the round goes on."""
    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0))
    requests = list(strategy.configure_train(1, record(weights()), ConfigRecord(), LocalGrid(lambda *_: None, 2)))
    good, _ = Compressor.preset("fstq", MANIFEST, BASE).compress(step(0, 0, 1), budget=900, round=1)
    at = min(at, len(good))
    bad = good[:at] + noise + good[at + len(noise) :] if valid else noise
    replies = [Message(RecordDict({"arrays": pack(blob), "metrics": MetricRecord({"num-examples": 1})}), reply_to=to)
               for blob, to in zip((good, bad), requests, strict=True)]  # fmt: skip
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None and metrics["fstq-used"] + metrics["fstq-refused"] == 2
    assert metrics["fstq-used"] == 1 or bad == good


def test_requests_carry_what_each_client_needs() -> None:
    budgets = UplinkBudgets(seconds=2, assumed=5000, table={3: 2000.0})
    strategy = FstqStrategy(FedAvg(), BASE, budgets, run="run")
    strategy.heard, strategy.uplinks = {2: 4}, {2: 20_000.0, 3: 9e9}
    requests = strategy.configure_train(5, record(weights()), ConfigRecord({"lr": 0.1}), LocalGrid(lambda *_: None, 3))
    found = {request.metadata.dst_node_id: Request.of(request.content) for request in requests}
    assert sorted(request.slot for request in found.values()) == [0, 1, 2]
    assert {node: replace(request, slot=0) for node, request in found.items()} == {
        2: Request("run", 5, 4, 40_000 - OVERHEAD, slots=3),
        3: Request("run", 5, -1, 4000 - OVERHEAD, slots=3),
        4: Request("run", 5, -1, 10_000 - OVERHEAD, slots=3),
    }
    assert all(request.content["config"]["lr"] == 0.1 for request in requests)


def test_stragglers_send_less(tmp_path: Path) -> None:
    """Clients report 1 to 8 KB/s: from the second round on each message fills its own budget."""
    speeds = {client: 1000.0 * 2**client for client in range(4)}
    sizes: dict[tuple[int, int], int] = {}
    rounds = [0]

    def fault(reply: Any) -> Any:
        if reply.metadata.message_type == "train":
            sizes[rounds[0] // 4, reply.metadata.src_node_id - 2] = len(unpack(reply.content))
            rounds[0] += 1
        return reply

    apps = {client: make_app([FstqMod(BASE, tmp_path, uplink=speed)], exact=False) for client, speed in speeds.items()}

    def app(message: Any, context: Any) -> Any:
        return apps[context.node_config["partition-id"]](message, context)

    grid = LocalGrid(app, 4, fault=fault)
    budgets = UplinkBudgets(seconds=1.25, assumed=4000, lowest=300)
    FstqStrategy(FedAvg(), BASE, budgets).start(grid, record(weights()), 2)
    for client, speed in speeds.items():
        assert sizes[0, client] <= 1.25 * 4000 - OVERHEAD
        assert sizes[1, client] <= max(1.25 * speed - OVERHEAD, 300)
    assert [sizes[1, client] for client in range(3)] == sorted(sizes[1, client] for client in range(3))
    assert sizes[1, 2] > 4 * sizes[1, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: UplinkBudgets(seconds=0),
        lambda: UplinkBudgets(assumed=float("inf")),
        lambda: UplinkBudgets(table={4: -1.0}),
        lambda: UplinkBudgets(lowest=10),
        lambda: UplinkBudgets(lowest=5000, highest=4000),
        lambda: SameBudget(100),
        lambda: FstqStrategy(FedAvg(), b"short"),
    ],
)
def test_bad_settings(make: Callable[[], Any]) -> None:
    with pytest.raises(OptionError):
        make()
