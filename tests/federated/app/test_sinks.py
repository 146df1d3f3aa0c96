"""Figures of rounds: JSON lines that survive a restart, trackers that get what they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from fstq_infer.errors import MissingExtraError, OptionError, StateError
from fstq_infer.federated.app.sinks import SINKS, JsonLines, names_of, open_sinks, read_lines


def test_lines_and_rounds_done_again(tmp_path: Path) -> None:
    path = tmp_path / "out/rounds.jsonl"
    sink = JsonLines(path)
    for round in (1, 2, 3):
        sink.write(round, {"loss": 1.0 / round, "held_out_loss": None})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"round": 4, "lo')  # cut off while it was written
    again = JsonLines(path)
    again.write(3, {"loss": 9.0})
    again.write(4, {"loss": 8.0})
    assert [line["round"] for line in read_lines(path)] == [1, 2, 3, 4]
    assert [line["loss"] for line in read_lines(path)] == [1.0, 0.5, 9.0, 8.0]


def test_a_run_from_the_start_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        JsonLines(tmp_path / "a").write(1, {"loss": value})
    assert read_lines(tmp_path / "a") == [{"round": 1, "loss": 2.0}] and read_lines(tmp_path / "none") == []


def test_lines_are_whole_where_dropping_some_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rounds.jsonl"
    JsonLines(path).write(1, {"loss": 1.0})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="No space left"):
        JsonLines(path).write(2, {"loss": 0.5})
    assert read_lines(path) == [{"round": 1, "loss": 1.0}] and list(tmp_path.iterdir()) == [path]


def test_names() -> None:
    assert names_of(" tensorboard, wandb") == ["tensorboard", "wandb"] and names_of("") == []
    with pytest.raises(OptionError, match="did you mean 'mlflow'"):
        names_of("mlflo")


@pytest.mark.parametrize("name", SINKS)
def test_every_tracker_takes_rounds_or_names_its_extra(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    try:
        sinks = open_sinks(tmp_path, name, "project", {"server.rounds": 2})
    except MissingExtraError as error:
        assert f"fstq-infer[{name}]" in str(error)
        return
    for round in (1, 2):
        for sink in sinks:
            sink.write(round, {"loss": 0.5, "held_out_loss": None, "used": 3})
    for sink in sinks:
        sink.close()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "rounds.jsonl"]
    assert written and len(read_lines(tmp_path / "rounds.jsonl")) == 2
