"""Whole federations from a configuration: adapters that PEFT loads, resuming, options, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="a federation needs the 'federated' extra")
pytest.importorskip("flwr_datasets", reason="dividing rows needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")
pytest.importorskip("peft", reason="training needs the 'federated' extra")
pytest.importorskip("transformers", reason="training needs the 'federated' extra")

from flwr.app import Context, RecordDict
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fstq_infer.cli import app as cli
from fstq_infer.cli import main
from fstq_infer.errors import ConfigError, DataError, OptionError, PrivacyOrderError, StateError
from fstq_infer.federated.app import privacy, server
from fstq_infer.federated.app.client_app import site_of
from fstq_infer.federated.app.command import new, run
from fstq_infer.federated.app.config import Config, from_flower, load
from fstq_infer.federated.app.simulate import simulate
from fstq_infer.federated.app.sinks import read_lines
from fstq_infer.federated.app.text import Texts
from fstq_infer.federated.train import IGNORED
from tests.federated.tiny import save_model, save_rows


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl")
    return folder


def settings(site: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model.path": str(site / "model"), "model.rank": 4, "data.path": str(site / "rows.jsonl"),
        "train.steps": 4, "train.batch": 4, "train.learning_rate": 1e-2, "messages.bytes": 700,
        "server.rounds": 3, "simulation.clients": 3, "output.folder": str(out), "output.save_every": 2,
        "client.memory": str(out / "memory"), **more,
    }  # fmt: skip


def start(site: Path, out: Path, resume: bool = False, **more: Any) -> list[dict[str, Any]]:
    simulate(from_flower(settings(site, out, **{key.replace("__", "."): value for key, value in more.items()})), resume)
    return read_lines(out / "rounds.jsonl")


def test_learns_and_saves_adapters_that_peft_loads(site: Path, tmp_path: Path) -> None:
    lines = start(site, tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3] and all(line["used"] == 3 for line in lines)
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"] and lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 < line["bytes_up"] <= 3 * 700 < line["bytes_down"] for line in lines)
    for name in ("adapter", "adapter-0002"):
        model = AutoModelForCausalLM.from_pretrained(site / "model")
        assert PeftModel.from_pretrained(model, str(tmp_path / name)).peft_config["default"].r == 4
    assert not (tmp_path / "adapter-0003").exists()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"messages__preset": "mosaic", "model__factors": "B"},
        {"tokens__keep": 0.5, "tokens__every": 2, "messages__downlink": "fstq", "messages__downlink_bytes": 900},
        {"messages__preset": "top-k", "messages__downlink": "lossless", "server__strategy": "FedAvgM",
         "strategy__server_momentum": 0.5},
        {"messages__preset": "mosaic", "messages__downlink": "fstq", "messages__downlink_bytes": 900,
         "messages__downlink_start": "drawn", "server__average": 4.0},
    ],
)  # fmt: skip
def test_resumed_is_the_same_bit_for_bit(site: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    whole = start(site, tmp_path / "whole", **more)
    start(site, tmp_path / "cut", **more, server__rounds=2)
    ours = start(site, tmp_path / "cut", resume=True, **more)
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(np.array_equal(values, second[key]) for key, values in first.items()) and first.keys() == second.keys()
    for line in whole + ours:
        del line["seconds"]
    assert whole == ours
    again = start(site, tmp_path / "cut", resume=True, **more)
    assert [line["round"] for line in again] == [1, 2, 3]
    with pytest.raises(StateError, match="Resume"):
        start(site, tmp_path / "cut", **more)


def test_downlink_bytes_fall_and_tokens_are_left_out(site: Path, tmp_path: Path) -> None:
    plain = start(site, tmp_path / "plain")
    ours = start(site, tmp_path / "ours", messages__downlink="fstq", messages__downlink_bytes=900, tokens__keep=0.5,
                 tokens__every=2)  # fmt: skip
    assert ours[-1]["bytes_down"] < 0.3 * plain[-1]["bytes_down"] and ours[-1]["held_out_loss"] < 5
    drawn = start(site, tmp_path / "drawn", messages__downlink="fstq", messages__downlink_bytes=900,
                  messages__downlink_start="drawn")  # fmt: skip
    assert drawn[0]["bytes_down"] < 0.3 * ours[0]["bytes_down"] and drawn[0]["used"] == 3
    assert list((tmp_path / "ours/memory").glob("tokens-*")) and not list((tmp_path / "plain/memory").glob("tokens-*"))


def test_budgets_follow_each_clients_uplink(site: Path, tmp_path: Path) -> None:
    """Client 0 is slow, client 1 fast: their messages have what they carry, from the second round on."""
    more = {"client.uplink": "1800, 3000", "messages.seconds": 1.0, "messages.assumed": 2500.0, "messages.lowest": 256,
            "simulation.clients": 2, "strategy.fraction_evaluate": 0.0}  # fmt: skip
    chosen = settings(site, tmp_path, **more)
    del chosen["messages.bytes"]
    simulate(from_flower(chosen))
    lines = read_lines(tmp_path / "rounds.jsonl")
    assert lines[0]["bytes_up"] <= 2 * (2500 - 1024)
    assert all(line["bytes_up"] <= 1800 - 1024 + 3000 - 1024 for line in lines[1:])
    assert all(line["held_out_loss"] is None for line in lines)


@pytest.mark.parametrize("kind", ["server-fixed", "server-adaptive", "client-fixed", "client-adaptive", "local"])
def test_sound_privacy_runs(site: Path, tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {"privacy__kind": kind, "privacy__noise_multiplier": 0.01, "server__rounds": 1}
    if kind != "local":
        more["privacy__clients"] = 3
    if kind.startswith("client"):
        more["messages__preset"] = "lossless"
    if kind == "local":
        more |= {"train__fisher": False, "privacy__epsilon": 100.0}
    if kind == "server-adaptive":
        more["server__strategy"] = "FedProx"
        more["strategy__proximal_mu"] = 0.1
    lines = start(site, tmp_path, **more)
    assert lines[0]["used"] == 3 and lines[0]["refused"] == 0


@pytest.mark.parametrize(
    ("more", "kind", "match"),
    [
        ({"privacy.kind": "secagg"}, PrivacyOrderError, "masked"),
        ({"privacy.kind": "client-fixed", "privacy.clients": 3}, PrivacyOrderError, "error feedback"),
        ({"privacy.kind": "local"}, PrivacyOrderError, "fisher = false"),
        ({"privacy.kind": "server-fixed", "messages.preset": "mosaic"}, PrivacyOrderError, "completed from each other"),
        ({"privacy.kind": "server-fixed"}, OptionError, "needs 'clients'"),
        ({"privacy.kind": "server-fixed", "privacy.clients": 3, "server.strategy": "FedMedian"}, PrivacyOrderError,
         "made for a mean"),
        ({"privacy.kind": "server-fixed", "privacy.clients": 3, "server.strategy": "FedAdam"}, PrivacyOrderError,
         "made for a mean"),
        ({"privacy.kind": "server-fixed", "privacy.clients": 3, "server.enough": 2}, PrivacyOrderError, "fewer"),
    ],
)  # fmt: skip
def test_unsound_privacy_is_refused_before_anything_runs(
    site: Path, tmp_path: Path, more: dict[str, Any], kind: Any, match: str
) -> None:
    config = from_flower(settings(site, tmp_path / "out", **more))
    for way in (lambda: privacy.check(config), lambda: server.strategy_of(config, bytes(16))):
        with pytest.raises(kind, match=match):
            way()


def test_what_a_user_is_told(site: Path, tmp_path: Path) -> None:
    for key, value, kind, match in (
        ("model__path", str(tmp_path / "none"), OptionError, "there is no folder"),
        ("data__path", str(tmp_path / "none.jsonl"), DataError, "none.jsonl"),
        ("data__kind", "csvv", DataError, "csvv"),
        ("data__partition", "iidd", DataError, "iidd"),
        ("client__uplink", "fast", OptionError, "numbers with commas"),
    ):
        with pytest.raises(kind, match=match):
            start(site, tmp_path / key, **{key: value})


def test_command_line(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fed", "new", str(tmp_path / "app"), "--model", str(site / "model"), "--data", str(site / "rows.jsonl")])
    assert ended.value.code == 0
    project = tmp_path / "app/pyproject.toml"
    config: Config = load(project)
    assert config.model.path == str(site / "model")
    with pytest.raises(OptionError, match="not empty"):
        new(tmp_path / "app", model="m", data="d")
    capsys.readouterr()
    changes = ["server.rounds=1", "train.steps=1", "simulation.clients=2"]
    run(project, resume=False, changes=changes, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["rounds"] == 1 and Path(printed["adapter"], "adapter_config.json").exists()
    assert printed["bytes_up"] == printed["last"]["bytes_up"] > 0
    run(project, resume=True, changes=[*changes, "server.rounds=2"], json=False)
    assert "2 rounds, round 2, loss" in capsys.readouterr().out
    assert cli.registered_groups


def test_own_data_and_node_configuration(site: Path, tmp_path: Path) -> None:
    for client in range(3):
        save_rows(tmp_path / f"rows-{client}.jsonl", 12 + client)
    lines = start(site, tmp_path / "out", data__partition="own", data__path=str(tmp_path / "rows-{client}.jsonl"))
    assert lines[-1]["used"] == 3
    nameless = Context(1, 5, {}, RecordDict(), settings(site, tmp_path))
    with pytest.raises(ConfigError, match="partition-id"):
        site_of(nameless).examples(nameless)


def test_texts(site: Path) -> None:
    texts = Texts.of(str(site / "model"), 6)
    (row,) = texts.examples([("w1 w2", "w3 w4", "")])
    assert row.tokens == (1, 2, 3, 4, 38) and row.labels == (IGNORED, IGNORED, 3, 4, 38)
    (long,) = texts.examples([("w1 w2 w3 w4", "w5 w6 w7 w8 w9", "")])
    assert long.tokens == (2, 3, 4, 5, 6, 7) and long.labels[3:] == (5, 6, 7)
    (whole,) = Texts.of(str(site / "model"), 6, learn_all=True).examples([("w1 w2", "w3", "")])
    assert whole.labels == whole.tokens
    assert texts.examples([("", "", "")]) == []
    with pytest.raises(OptionError, match="tokenizer"):
        Texts.of(str(site / "rows.jsonl"), 6)


@pytest.mark.parametrize("learn_all", [False, True])
def test_an_answer_is_cut_as_it_follows_the_prompt(learn_all: bool) -> None:
    """Byte pieces hold the space before a word: the labels are what a model says after the prompt, not "Rapmos"."""
    texts = Texts.of(str(Path(__file__).parents[3] / "export/fstq_export/demo/model"), 64, learn_all)
    (row,) = texts.examples([("Question: Where is Sendos? Answer:", "Rapmos.", "")])
    assert texts.tokenizer.decode(row.tokens) == "<s>Question: Where is Sendos? Answer: Rapmos.</s>"
    answer = texts.tokenizer.encode(" Rapmos.", add_special_tokens=False)
    assert list(row.tokens[-len(answer) - 1 : -1]) == answer
    assert learn_all or [label for label in row.labels if label != IGNORED] == [*answer, row.tokens[-1]]


def test_new_where_no_folder_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place, words in (("file", "cannot be made"), (".", "not empty")):
        with pytest.raises(SystemExit) as failed:
            main(["fed", "new", str(tmp_path / place)])
        assert failed.value.code == 1 and words in capsys.readouterr().err
