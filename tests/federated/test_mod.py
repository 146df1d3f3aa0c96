"""fstq_mod alone: what leaves a client, compared with arrays worked out by hand; errors; privacy orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the mod needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod

from fstq_infer.errors import OptionError, PrivacyOrderError, ReplyError
from fstq_infer.federated.budget import OVERHEAD
from fstq_infer.federated.compress import Compressor, decompress
from fstq_infer.federated.feedback import State
from fstq_infer.federated.local import LocalGrid, through_wire
from fstq_infer.federated.memory import MemoryFolder
from fstq_infer.federated.mod import FstqMod, fstq_mod
from fstq_infer.federated.order import check_mods
from fstq_infer.federated.records import PACKED, Request, pack, unpack
from fstq_infer.federated.tensors import TensorManifest

from .flower_apps import SHAPES, arrays_in, record, step, weights
from .samples import BASE

MANIFEST = TensorManifest.of(weights())
LocalGrid(lambda *_: None, 1)  # gives this process the identity without which Flower makes no message


def request(round: int = 1, heard: int = -1, budget: int = 1500, kind: str = "train", **settings: Any) -> Any:
    config = ConfigRecord({"server-round": round, **settings})
    content = Request("run", round, heard, budget).into(RecordDict({"arrays": record(weights()), "config": config}))
    return Message(content, 2, kind)


def context(**node_config: Any) -> Any:
    return Context(1, 2, node_config, RecordDict(), {})


def train(delta: dict[str, np.ndarray], **more: Any) -> Any:
    """An app that adds ``delta``."""

    def run(message: Any, _: Any) -> Any:
        held = arrays_in(message.content["arrays"])
        content = {"arrays": record({name: values + delta[name] for name, values in held.items()})}
        content |= {"metrics": MetricRecord({"num-examples": 7, "loss": 0.5})} | more
        return Message(RecordDict(content), reply_to=message)

    return run


def test_one_blob_and_untouched_metrics(tmp_path: Path) -> None:
    delta = step(0, 0, 1)
    reply = FstqMod(BASE, tmp_path)(request(), context(), train(delta))
    assert set(reply.content) == {"arrays", "metrics"} and list(reply.content["arrays"]) == [PACKED]
    assert dict(reply.content["metrics"]) == {"num-examples": 7, "loss": 0.5}
    expected, _ = Compressor.preset("fstq", MANIFEST, BASE).compress(delta, None, State(), 1500, 1)
    assert unpack(reply.content) == expected


def test_lossless_is_the_delta(tmp_path: Path) -> None:
    delta = step(0, 0, 1)
    reply = FstqMod(BASE, tmp_path, "lossless")(request(budget=0), context(), train(delta))
    found = decompress(unpack(reply.content), MANIFEST, BASE, 1)
    assert all(np.array_equal(found[name], delta[name]) for name in SHAPES)


def test_error_feedback_over_rounds(tmp_path: Path) -> None:
    """Two rounds by hand: the second update is its delta and the residual of the first, as fp16 keeps it."""
    mod, compressor = FstqMod(BASE, tmp_path), Compressor.preset("fstq", MANIFEST, BASE)
    first = unpack(mod(request(1), context(), train(step(0, 0, 1))).content)
    blob, state = compressor.compress(step(0, 0, 1), None, State(), 1500, 1)
    assert first == blob and state.residual is not None
    held = MemoryFolder(tmp_path).load("2", MANIFEST, BASE, "run", 2)
    assert held.round == 1 and held.message == blob and held.state.residual is not None
    np.testing.assert_allclose(held.state.residual, state.residual, rtol=2**-11, atol=0)
    second = unpack(mod(request(2, heard=1), context(), train(step(0, 0, 2))).content)
    assert second == compressor.compress(step(0, 0, 2), None, held.state, 1500, 2)[0]


def test_a_message_that_was_not_used_is_sent_again(tmp_path: Path) -> None:
    mod, zero = FstqMod(BASE, tmp_path), {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    arrived = np.zeros(MANIFEST.parameters, np.float32)
    mod(request(1), context(), train(step(0, 0, 1)))  # lost
    heard = 0  # asked for round 1, and nothing came
    for round in range(2, 40):
        reply = mod(request(round, heard, budget=4000), context(), train(zero))
        arrived += MANIFEST.flatten(decompress(unpack(reply.content), MANIFEST))
        heard = round
    np.testing.assert_allclose(arrived, MANIFEST.flatten(step(0, 0, 1)), atol=2e-3)


def test_a_node_that_is_new_to_the_server_keeps_its_memory(tmp_path: Path) -> None:
    """A SuperNode that restarts may get another id: its last message may well have been used."""
    for heard, same in ((-1, True), (1, True), (0, False)):
        mod = FstqMod(BASE, tmp_path / str(heard))
        mod(request(1), context(), train(step(0, 0, 1)))
        held = MemoryFolder(tmp_path / str(heard)).load("2", MANIFEST, BASE, "run", 2)
        blob = unpack(mod(request(2, heard), context(), train(step(0, 0, 2))).content)
        expected, _ = Compressor.preset("fstq", MANIFEST, BASE).compress(step(0, 0, 2), None, held.state, 1500, 2)
        assert (blob == expected) == same


def test_a_round_done_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """A server that goes back one round finds each client as it was."""
    mod = FstqMod(BASE, tmp_path)
    blobs = [unpack(mod(request(round, round - 1), context(), train(step(0, 0, round))).content) for round in (1, 2, 3)]
    again = [unpack(mod(request(3, 2), context(), train(step(0, 0, 3))).content) for _ in range(2)]
    assert again == [blobs[2], blobs[2]]


def test_clients_and_runs_do_not_mix(tmp_path: Path) -> None:
    mod = FstqMod(BASE, tmp_path)
    first = unpack(mod(request(1), context(**{"partition-id": 0}), train(step(0, 0, 1))).content)
    fresh = unpack(mod(request(2), context(**{"partition-id": 1}), train(step(0, 0, 1))).content)
    assert decompress(fresh, MANIFEST).keys() == SHAPES.keys() and fresh[56:] == first[56:]
    other = Request("other run", 2, -1, 1500).into(request(2).content)
    again = mod(Message(other, 2, "train"), context(**{"partition-id": 0}), train(step(0, 0, 1)))
    assert unpack(again.content)[56:] == first[56:]


def test_the_apps_fisher_weighs_coordinates_and_stays(tmp_path: Path) -> None:
    fisher = {name: np.full(shape, 1e-6, np.float32) for name, shape in SHAPES.items()}
    name = "layer.0.lora_B"
    fisher[name] += np.float32(1e-2)
    delta = step(0, 0, 1)
    replies = [FstqMod(BASE, tmp_path / str(number))(request(budget=600), context(), train(delta, **more))
               for number, more in enumerate(({}, {"fstq-fisher": record(fisher)}))]  # fmt: skip
    assert set(replies[1].content) == {"arrays", "metrics"}
    plain, weighted = (decompress(unpack(reply.content), MANIFEST) for reply in replies)
    assert np.square(weighted[name] - delta[name]).sum() < 0.5 * np.square(plain[name] - delta[name]).sum()
    held = MemoryFolder(tmp_path / "1").load("2", MANIFEST, BASE, "run", 2)
    assert held.fisher is not None
    np.testing.assert_allclose(held.fisher, MANIFEST.flatten(fisher), rtol=2**-10)


def test_errors_and_other_messages_pass_through(tmp_path: Path) -> None:
    mod = FstqMod(BASE, tmp_path)

    def fails(message: Any, _: Any) -> Any:
        return Message(Error(2, "out of memory"), reply_to=message)

    assert mod(request(), context(), fails).error.reason == "out of memory"
    answer = Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), 2, "evaluate")
    assert mod(request(kind="evaluate"), context(), lambda *_: answer) is answer
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda held: {**held, "more": held["layer.0.lora_A"]}, "'more'"),
        (lambda held: {name: held[name] for name in list(held)[1:]}, "lacks 'layer.0.lora_A'"),
        (lambda held: {**held, "layer.0.lora_A": np.full((8, 40), np.nan, np.float32)}, "NaN"),
        (lambda held: {**held, "layer.0.lora_A": held["layer.0.lora_A"].T}, r"\(40, 8\)"),
        (lambda held: {**held, "layer.0.lora_A": np.zeros((8, 40), np.int64)}, "int64"),
    ],
)
def test_replies_that_do_not_fit_become_errors(tmp_path: Path, change: Any, match: str) -> None:
    def app(message: Any, _: Any) -> Any:
        content = {"arrays": record(change(arrays_in(message.content["arrays"]))),
                   "metrics": MetricRecord({"num-examples": 7})}  # fmt: skip
        return Message(RecordDict(content), reply_to=message)

    with pytest.raises(AssertionError, match=match):
        raise AssertionError(FstqMod(BASE, tmp_path)(request(), context(), app).error.reason)


def test_errors_of_flowers_mods_answer_the_request(tmp_path: Path) -> None:
    """A clipping mod that finds two array records answers the app's reply; the server waits for one to its request."""
    fisher = {"fstq-fisher": record(step(0, 0, 1))}
    asked, app = request(clipping_norm=1.0), train(step(0, 0, 1), **fisher)
    reply = FstqMod(BASE, tmp_path, "lossless")(asked, context(), lambda m, c: fixedclipping_mod(m, c, app))
    assert reply.has_error() and reply.metadata.reply_to_message_id == asked.metadata.message_id


def test_a_server_without_the_wrapper_is_named(tmp_path: Path) -> None:
    plain = Message(RecordDict({"arrays": record(weights()), "config": ConfigRecord({"server-round": 1})}), 2, "train")
    assert "FstqStrategy" in FstqMod(BASE, tmp_path)(plain, context(), train(step(0, 0, 1))).error.reason


def test_configuration_of_the_plain_function(tmp_path: Path) -> None:
    settings = {"fstq-base": BASE.hex(), "fstq-memory": str(tmp_path), "fstq-preset": "lossless", "fstq-uplink": 9e4}
    reply = fstq_mod(request(budget=0), context(**settings), train(step(0, 0, 1)))
    assert unpack(reply.content) and reply.content["fstq"]["uplink"] == 9e4
    for bad in ({"fstq-base": "xyz"}, {"fstq-base": "00"}, {"fstq-preset": "zip"}, {"fstq-uplink": "fast"}):
        assert fstq_mod(request(), context(**{**settings, **bad}), train(step(0, 0, 1))).has_error()
    assert "fstq-memory" in fstq_mod(request(), context(**{"fstq-base": "00"}), train({})).error.reason


@pytest.mark.parametrize("arguments", [(b"short", "x"), (BASE, "x", "zip"), (BASE, "x", "fstq", None, None, 1.0)])
def test_bad_settings(arguments: Any) -> None:
    with pytest.raises(OptionError):
        FstqMod(*arguments)


def test_one_array_costs_little(tmp_path: Path) -> None:
    """448 tensors: what Flower adds to them, and to one message."""
    many = {f"base_model.model.layers.{number}.lora_A.weight": np.zeros((2, 2), np.float32) for number in range(448)}
    content = {"metrics": MetricRecord({"num-examples": 7, "loss": 0.5})}
    sizes = [through_wire(Message(RecordDict({"arrays": arrays, **content}), 2, "train"), "1")[1]
             for arrays in (record({name: values + index for index, (name, values) in enumerate(many.items())}),
                            pack(bytes(1000)))]  # fmt: skip
    assert sizes[0] - 448 * 16 > 200_000
    assert sizes[1] - 1000 < OVERHEAD


def test_unpack_refuses_other_records() -> None:
    fake = ArrayRecord({PACKED: Array(np.zeros(3, np.uint8))})
    for held in ({"arrays": record(weights())}, {"arrays": fake}, {}, {"a": pack(b"x"), "b": pack(b"x")}):
        with pytest.raises(ReplyError, match="fstq_mod"):
            unpack(RecordDict(held))


def test_privacy_orders() -> None:
    local, ours = LocalDpMod(1.0, 1.0, 1.0, 1e-5), FstqMod(BASE, "x")
    assert check_mods([ours, local]) == [ours, local]
    assert check_mods([local]) == [local]
    assert check_mods([ours, fixedclipping_mod], "lossless")

    def secaggplus_mod(*_: Any) -> None: ...

    for mods, options, match in (
        ([local, ours], {}, "before"),
        ([fixedclipping_mod, fstq_mod], {}, "before"),
        ([ours, fixedclipping_mod], {}, "error feedback"),
        ([ours, local], {"fisher": True}, "raw gradients"),
        ([ours, fixedclipping_mod], {"preset": "lossless", "fisher": True}, "one array record"),
        ([ours, secaggplus_mod], {}, "masked"),
        ([ours, fstq_mod], {}, "twice"),
    ):
        with pytest.raises(PrivacyOrderError, match=match):
            check_mods(mods, **options)


def test_client_side_clipping_is_refused_when_it_happens(tmp_path: Path) -> None:
    for preset, fails in (("fstq", True), ("lossless", False)):
        asked = request(budget=0 if preset == "lossless" else 1500, clipping_norm=1.0)
        reply = FstqMod(BASE, tmp_path, preset)(asked, context(), train(step(0, 0, 1)))
        assert reply.has_error() == fails
        if fails:
            assert "unsound" in reply.error.reason and "Clip on the server" in reply.error.reason


def test_local_noise_then_compression_runs(tmp_path: Path) -> None:
    """In the order that check_mods accepts, through Flower's own mod."""
    local = LocalDpMod(1.0, 1e-4, 10.0, 1e-5)
    inner = train(step(0, 0, 1))
    reply = FstqMod(BASE, tmp_path)(request(), context(), lambda m, c: local(m, c, inner))
    assert np.isfinite(MANIFEST.flatten(decompress(unpack(reply.content), MANIFEST, BASE, 1))).all()
    wrong = local(request(), context(), lambda m, c: FstqMod(BASE, tmp_path)(m, c, inner))
    assert wrong.has_error()
