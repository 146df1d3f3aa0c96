"""Weights sent as changes: what clients end up with, rounds missed, memories lost, damage, resuming, bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="downlinks need the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from fstq_infer.errors import MessageError, MessageSizeError, MessageTruncatedError, OptionError, ReplyError
from fstq_infer.federated.budget import SameBudget
from fstq_infer.federated.compress import decompress
from fstq_infer.federated.downlink import WHOLE, Broadcast, Downlink, added, apply, checksum, split
from fstq_infer.federated.downlink_mod import DownlinkMod
from fstq_infer.federated.local import LocalGrid
from fstq_infer.federated.mod import FstqMod
from fstq_infer.federated.order import check_mods
from fstq_infer.federated.server import Rounds, federate
from fstq_infer.federated.strategy import FstqStrategy
from fstq_infer.federated.tensors import TensorManifest

from .flower_apps import arrays_in, make_app, make_grid, record, step, weights
from .samples import BASE

LocalGrid(lambda *_: None, 1)  # gives this process the identity without which Flower makes no message
WHOLE_BYTES = sum(values.nbytes for values in weights().values())
CONTENT = RecordDict({"arrays": record(weights()), "config": ConfigRecord({"server-round": 1})})


def app_with_downlink(folder: Path, preset: str) -> Any:
    """One app for both kinds of messages, so that evaluation has the mod too."""
    downlink = DownlinkMod(BASE, folder)
    inner = make_app([FstqMod(BASE, folder, preset)], exact=False)
    return lambda message, context: downlink(message, context, inner)


def run(folder: Path, downlink: Downlink | None, inner: Any = None, rounds: int = 5, **options: Any) -> Any:
    preset = options.pop("preset", "lossless")
    resume, cut, fault = options.pop("resume", False), options.pop("cut", None), options.pop("fault", None)

    def evaluate(round: int, arrays: Any) -> Any:
        if round == cut:
            raise InterruptedError
        return MetricRecord({"sum": sum(float(values.sum()) for values in arrays_in(arrays).values())})

    budget = SameBudget(0 if preset == "lossless" else 700)
    strategy = FstqStrategy(inner or FedAvg(**options), BASE, budget, run="run", downlink=downlink)
    grid = make_grid(folder, preset) if downlink is None else LocalGrid(app_with_downlink(folder, preset), 6)
    grid.fault = fault
    if downlink is None:
        grid = LocalGrid(make_app([FstqMod(BASE, folder, preset)], exact=False), 6, fault=fault)
    plan = Rounds(rounds, seed=3, timeout=5, checkpoint=folder / "server.safetensors", resume=resume)
    return strategy, federate(strategy, grid, record(weights()), plan, evaluate_fn=evaluate)


@pytest.mark.parametrize("inner", [lambda: FedAvg(), lambda: FedAdam(eta=0.01)])
def test_a_lossless_downlink_gives_what_whole_weights_give(tmp_path: Path, inner: Any) -> None:
    _, expected = run(tmp_path / "whole", None, inner())
    strategy, found = run(tmp_path / "changes", Downlink("lossless"), inner())
    for name, values in arrays_in(expected.arrays).items():
        np.testing.assert_allclose(found.arrays[name].numpy(), values, atol=1e-5)
    assert strategy.refused.total() == 0 and set(strategy.downlink.held.values()) == {5}


def test_errors_of_a_lossy_downlink_do_not_add_up(tmp_path: Path) -> None:
    """The server's own weights stay exact; what clients hold follows them."""
    _, expected = run(tmp_path / "whole", None)
    strategy, found = run(tmp_path / "changes", Downlink("fstq", 1200))
    for name, values in arrays_in(expected.arrays).items():  # this app's steps do not depend on weights
        np.testing.assert_allclose(found.arrays[name].numpy(), values, atol=1e-5)
    for _ in range(30):
        strategy.downlink.advance({k: v + np.float32(1e-9) for k, v in arrays_in(found.arrays).items()}, BASE)
        strategy.downlink.advance(arrays_in(found.arrays), BASE)
    for name, values in arrays_in(found.arrays).items():
        np.testing.assert_allclose(strategy.downlink.weights[name], values, atol=2e-3)


def test_bytes_are_those_of_messages_but_for_the_first(tmp_path: Path) -> None:
    strategy, _ = run(tmp_path, Downlink("fstq", 1200), rounds=1)
    assert 6 * WHOLE_BYTES < strategy.sent <= 6 * (WHOLE_BYTES + 1200)  # whole to train, a change to evaluate
    strategy, _ = run(tmp_path, Downlink("fstq", 1200), rounds=3, resume=True)
    assert 0 < strategy.sent <= 6 * 1200  # the weights of training were sent for evaluation already


def test_clients_that_missed_rounds_get_messages_in_a_row_and_then_all_weights(tmp_path: Path) -> None:
    """Node 2 is not heard of from round 2 on; each version is one message until its history ends."""
    down = Downlink("fstq", 600, history=3)
    seen: list[tuple[int, int]] = []
    for version in range(6):
        arrays = {k: v + np.float32(0.01 * version) * step(0, 0, version)[k] for k, v in weights().items()}
        down.advance(arrays, BASE)
        content, size = down.content_for(2, CONTENT, "run")
        found = Broadcast.of(content)
        assert found is not None
        seen.append((found.since, size))
        if version == 0:
            down.heard(2, 0)
    assert [since for since, _ in seen] == [WHOLE, 0, 0, 0, WHOLE, WHOLE]
    assert seen[0][1] == WHOLE_BYTES and seen[1][1] < seen[2][1] < seen[3][1] <= 1800
    for nonsense in (None, -5, 99, "2"):
        down.heard(2, nonsense)
        assert 2 not in down.held


def test_a_client_that_lost_its_memory_costs_one_round(tmp_path: Path) -> None:
    strategy, _ = run(tmp_path, Downlink("lossless"), rounds=2)
    client = DownlinkMod(BASE, tmp_path)._paths("0")
    assert all(path.exists() for path in client)
    for path in client:
        path.write_bytes(b"damaged")
    strategy, result = run(tmp_path, Downlink("lossless"), rounds=4, resume=True)
    used = [int(metrics["fstq-used"]) for metrics in result.train_metrics_clientapp.values()]
    assert used == [6, 6, 5, 6] and strategy.refused == {"ClientError": 1}


def test_first_weights_that_clients_draw_are_sent_only_to_one_that_cannot(tmp_path: Path) -> None:
    """Node 2 draws others: it is refused once and then gets all weights."""

    def app(message: Any, context: Any) -> Any:
        seed = 1 if context.node_id == 2 else 0
        mod = DownlinkMod(BASE, tmp_path, start=lambda: weights(seed))
        return mod(message, context, make_app([FstqMod(BASE, tmp_path, "lossless")], exact=False))

    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0), run="run", downlink=Downlink("fstq", 900, drawn=True))
    sent = list[int]()
    result = federate(
        strategy, LocalGrid(app, 6), record(weights()), Rounds(2), on_round=lambda report: sent.append(strategy.sent)
    )
    assert [int(metrics["fstq-used"]) for metrics in result.train_metrics_clientapp.values()] == [5, 6]
    change = len(strategy.downlink.chain[0][1]) if strategy.downlink else 0
    assert sent[0] == 5 * change + WHOLE_BYTES and strategy.refused == {"ClientError": 1}
    assert set(strategy.downlink.held.values() if strategy.downlink else ()) == {2}


def test_a_drawn_start_ends_as_a_sent_one(tmp_path: Path) -> None:
    _, sent = run(tmp_path / "sent", Downlink("fstq", 900))

    def app(message: Any, context: Any) -> Any:
        mod = DownlinkMod(BASE, tmp_path / "drawn", start=weights)
        return mod(message, context, make_app([FstqMod(BASE, tmp_path / "drawn", "lossless")], exact=False))

    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0), run="run", downlink=Downlink("fstq", 900, drawn=True))
    drawn = federate(strategy, LocalGrid(app, 6), record(weights()), Rounds(5))
    for name, values in arrays_in(sent.arrays).items():
        assert values.tobytes() == drawn.arrays[name].numpy().tobytes()


def test_lost_replies_are_no_matter(tmp_path: Path) -> None:
    lost = {3: 2, 4: 1}

    def fault(reply: Any) -> Any:
        node = reply.metadata.src_node_id
        if reply.metadata.message_type == "train" and lost.get(node, 0):
            lost[node] -= 1
            return None
        return reply

    strategy, result = run(tmp_path, Downlink("fstq", 900), preset="fstq", fault=fault)
    assert [int(m["fstq-used"]) for m in result.train_metrics_clientapp.values()] == [4, 5, 6, 6, 6]
    assert strategy.refused.total() == 0


@pytest.mark.parametrize("preset", ["lossless", "fstq"])
def test_resumed_is_the_same_bit_for_bit(tmp_path: Path, preset: str) -> None:
    half = {"preset": preset, "fraction_train": 0.5, "fraction_evaluate": 0.5}
    _, whole = run(tmp_path / "whole", Downlink("fstq", 900), **half)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", Downlink("fstq", 900), cut=3, **half)
    _, ours = run(tmp_path / "cut", Downlink("fstq", 900), resume=True, **half)
    for key, values in arrays_in(whole.arrays).items():
        assert values.tobytes() == ours.arrays[key].numpy().tobytes()
    assert (tmp_path / "whole/server.safetensors").read_bytes() == (tmp_path / "cut/server.safetensors").read_bytes()


def chain(count: int) -> tuple[Downlink, bytes, Broadcast]:
    down = Downlink("fstq", 600)
    for version in range(count + 1):
        down.advance({k: v + np.float32(version) * step(0, 1, 1)[k] for k, v in weights().items()}, BASE)
    return down, b"".join(blob for _, blob in down.chain), Broadcast("run", count, 0, checksum(down.weights))


def test_apply_from_any_version_in_the_row() -> None:
    down, blob, broadcast = chain(3)
    held = weights()
    for version in range(4):
        found = apply(held, version, blob, broadcast, BASE)
        assert found is not None and checksum(found) == checksum(down.weights)
        if version < 3:
            message = next(b for v, b in down.chain if v == version + 1)
            held = added(held, decompress(message, TensorManifest.of(held)))
    assert apply(weights(), 4, blob, broadcast, BASE) is None
    assert apply({k: v + 1 for k, v in weights().items()}, 0, blob, broadcast, BASE) is None


ROW = chain(2)


@settings(deadline=None)
@given(st.data())
def test_damaged_rows_are_refused_or_fail_their_checksum(data: st.DataObject) -> None:
    _, blob, broadcast = ROW
    damaged = bytearray(blob)
    at = data.draw(st.integers(0, len(blob) - 1))
    if data.draw(st.booleans()):
        damaged[at] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[at:]
    with contextlib.suppress(MessageError):
        assert apply(weights(), 0, bytes(damaged), broadcast, BASE) is None


def test_rows_that_say_wrong_lengths() -> None:
    _, blob, _ = chain(1)
    assert list(split(blob)) == [blob] and list(split(blob * 3)) == [blob] * 3 and not list(split(b""))
    for bad in (blob[:-1], blob + b"\0", blob[:55], blob[:8] + b"\0\0\0\0" + blob[12:]):
        with pytest.raises(MessageTruncatedError):
            list(split(bad))
    with pytest.raises(MessageSizeError):
        list(split((b"\0" * 8 + (56).to_bytes(4, "little") + b"\0" * 44) * 1025))


def test_bad_settings_and_requests() -> None:
    for options in ({"preset": "zip"}, {"history": 0}, {"history": 5000}):
        with pytest.raises(OptionError):
            Downlink(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="floating point"):
        Downlink().advance({"a": np.zeros(3, np.int64)}, BASE)
    with pytest.raises(OptionError, match="16"):
        DownlinkMod(b"short", "x")
    assert Broadcast.of(CONTENT) is None
    with pytest.raises(ReplyError, match="fstq-from"):
        Broadcast.of(RecordDict({"config": ConfigRecord({"fstq-version": 1, "fstq-run": "run"})}))
    ours, first = FstqMod(BASE, "x"), DownlinkMod(BASE, "x")
    assert check_mods([first, ours]) == [first, ours]
    with pytest.raises(OptionError, match="first"):
        check_mods([ours, first])
