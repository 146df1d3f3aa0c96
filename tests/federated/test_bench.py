"""bench/federated.py: clients that train together, runs that go on where they were cut off, and what reports say."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")
pytest.importorskip("torch", reason="needs the 'export' extra")

import torch

from fstq_infer.federated.tokens import TokenScores, TokenSettings

from .tiny import WORDS, save_model

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("federated", "fed_llama", "fed_methods", "fed_report", "fed_server", "fed_tasks", "common")
CLIENTS, LENGTH = 5, 12
Import = Callable[[str], Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Import:
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def task(bench: Import) -> Any:
    rng = np.random.default_rng(1)
    rows = [torch.from_numpy(rng.integers(0, WORDS, (6 + client, LENGTH))) for client in range(CLIENTS + 1)]
    return bench("fed_tasks").Task(rows[:-1], rows[-1])


def setting(bench: Import, method: str, **changed: Any) -> Any:
    given = {"seed": 0, "rate": 0.01, "rounds": 3, "steps": 2, "batch": 2, "clients": CLIENTS, "drawn": 10}
    return bench("federated").Setting("tiny", method, **{**given, "dropout": 0.2, "loss": 0.2, **changed})


@pytest.mark.parametrize("parts", ["AB", "B", "B-vod"])
def test_clients_train_together_as_they_would_alone(bench: Import, folder: Path, parts: str) -> None:
    llama = bench("fed_llama")
    model, rows = llama.LoraLlama(folder), task(bench).clients
    mask = torch.from_numpy(np.isin(model.names, model.parts(parts)).astype(np.float32))
    start, work = model.start(0) + 0.01, llama.Work(3, 2, 0.01)
    seeds = list(range(len(rows)))
    together = model.train(start, rows, work, seeds, mask)
    for client, mine in enumerate(rows):
        alone = model.train(start, [mine], work, [client], mask)
        for one, all_of_them in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], all_of_them[client], rtol=2e-3, atol=2e-6)
    assert not together[0][:, mask.numpy() == 0].any() and np.abs(together[0]).max() > 0.01


def test_token_masks_leave_labels_out_and_move_on(bench: Import, folder: Path) -> None:
    llama = bench("fed_llama")
    model, rows = llama.LoraLlama(folder), task(bench).clients[:2]
    mask, work = torch.ones(len(model.names)), llama.Work(4, 2, 0.01)

    def train(keep: float) -> tuple[Any, list[TokenScores]]:
        scores = [TokenScores(TokenSettings(keep, every=2), WORDS) for _ in rows]
        return model.train(model.start(0), rows, work, [0, 1], mask, scores)[0], scores

    plain = model.train(model.start(0), rows, work, [0, 1], mask)[0]
    whole, half = train(1.0), train(0.5)
    np.testing.assert_allclose(whole[0], plain, atol=1e-6)
    assert np.abs(half[0] - plain).max() > 1e-3
    for one in half[1]:
        share = one.counts[one.kept].sum() / one.counts.sum()
        assert one.steps == 4 and 0.5 <= share < 0.9 and not one.kept.all()


METHODS = ("fedavg", "fedavg-fp16", "ffa", "fedpaq", "qsgd4", "nf4", "flasc", "top-k", "paper", "paper-tokens", "fstq",
           "mosaic", "mosaic-swift")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_off_ends_the_same(bench: Import, folder: Path, tmp_path: Path, method: str) -> None:
    federated = bench("federated")
    model, data = federated.LoraLlama(folder), task(bench)
    whole = federated.run(model, data, setting(bench, method), tmp_path / "whole")
    federated.run(model, data, setting(bench, method, rounds=2), tmp_path / "cut")
    again = federated.run(model, data, setting(bench, method), tmp_path / "cut")
    assert again == whole and len(whole) == 4
    assert whole[-1]["bytes"] > 0 and whole[-1]["seconds"] > 0 and whole[-1]["loss"] != whole[0]["loss"]
    assert federated.run(model, data, setting(bench, method), tmp_path / "cut") == whole  # nothing is left to do


def test_rounds_in_which_all_clients_drop_out(bench: Import, folder: Path, tmp_path: Path) -> None:
    federated = bench("federated")
    model, given = federated.LoraLlama(folder), setting(bench, "mosaic-swift", rounds=6, dropout=0.85, loss=0.0)
    rounds = federated.run(model, task(bench), given, tmp_path)
    used = [one["used"] for one in rounds]
    assert 0 in used[1:] and any(used)
    for before, after in itertools.pairwise(rounds):
        if not after["used"]:
            assert after["loss"] == before["loss"] and after["bytes"] == before["bytes"]


def test_a_damaged_run_begins_anew(bench: Import, folder: Path, tmp_path: Path, capsys: Any) -> None:
    federated = bench("federated")
    model, data, given = federated.LoraLlama(folder), task(bench), setting(bench, "top-k")
    whole = federated.run(model, data, given, tmp_path)
    state = tmp_path / f"{given.name}.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    assert federated.run(model, data, given, tmp_path) == whole
    assert "begins anew" in capsys.readouterr().out


def test_messages_of_the_server_are_smaller_and_clients_follow(
    bench: Import, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federated, methods = bench("federated"), bench("fed_methods")
    swift = methods.Method(methods.tiles(500), "server's messages of 700 bytes", "B-vod", downlink=700)
    monkeypatch.setitem(methods.METHODS, "swift", swift)
    monkeypatch.setitem(methods.METHODS, "full", methods.Method(swift.codec, "whole weights", "B-vod"))
    model, data = federated.LoraLlama(folder), task(bench)
    whole = federated.run(model, data, setting(bench, "full", rounds=6, loss=0.0), tmp_path)
    small = federated.run(model, data, setting(bench, "swift", rounds=6, loss=0.0), tmp_path)
    assert small[-1]["bytes"] == whole[-1]["bytes"] and small[-1]["down"] < 0.8 * whole[-1]["down"]
    assert small[-1]["seconds"] < whole[-1]["seconds"] and abs(small[-1]["loss"] - whole[-1]["loss"]) < 0.02


def test_reached_interpolates_between_rounds(bench: Import) -> None:
    reached = bench("fed_report").reached
    zero = {"round": 0, "bytes": 0, "down": 0, "seconds": 0.0, "joules": 0.0, "loss": 4.0}
    rounds = [zero, {"round": 1, "bytes": 100, "down": 10, "seconds": 2.0, "joules": 1.0, "loss": 2.0}]
    assert reached(rounds, 3.0) == {"rounds": 0.5, "bytes": 50.0, "down": 5.0, "seconds": 1.0, "joules": 0.5}
    assert reached(rounds, 2.0)["rounds"] == 1 and reached(rounds, 1.9) is None


def test_a_report_of_runs_so_far(bench: Import, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federated, report = bench("federated"), bench("fed_report")
    monkeypatch.setattr(bench("common"), "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    model, data, runs = federated.LoraLlama(folder), task(bench), tmp_path / "runs"
    for seed in range(3):
        for method, rate in (("fedavg", 0.01), ("fedavg", 0.001), ("mosaic-swift", 0.01), ("top-k", 0.01)):
            given = setting(bench, method, seed=seed, rate=rate, dropout=0.1, loss=0.0)
            federated.run(model, data, given, runs)
    federated.run(model, data, setting(bench, "mosaic-swift", dropout=0.7, drawn=5), runs)
    report.report(runs)
    written = json.loads((tmp_path / "federated.json").read_text(encoding="utf-8"))
    rows = {(row["setting"], row["method"], row["tuned_on"]): row for row in written["rows"]}
    label = "tiny, 5 clients, 2 steps, lte"
    assert rows[label, "fedavg", False]["seeds"] == [1, 2] and rows[label, "fedavg", True]["seeds"] == [0]
    assert rows[label, "fedavg", True]["rates_tried"] == [0.001, 0.01]
    assert rows[label, "fedavg", True]["at_95"]["uplink_times_smaller"] == 1
    assert set(rows[label, "fedavg", False]["at_60_by_seed"]) == {"1", "2"}
    assert (f"{label}, dropout 0.7, lost 0.2, 5 asked", "mosaic-swift", True) in rows
    assert any("lost 0.2" in what and "undisturbed" in what for what in written["targets"])
    assert any("seeds 1, 2, uplink times smaller" in what for what in written["targets"])
    assert len(list((tmp_path / "images").glob("*.svg"))) == 2
