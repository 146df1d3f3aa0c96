"""The configuration: what is accepted, and that each refusal names file, key and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="strategies need the 'federated' extra")

from fstq_infer.errors import ConfigError
from fstq_infer.federated.app.command import new
from fstq_infer.federated.app.config import from_flower, load
from fstq_infer.federated.app.inner import STRATEGIES, make
from fstq_infer.federated.app.tables import nested, parse_change

LEAST = "[model]\npath = 'm'\n[data]\npath = 'd.jsonl'\n"


def write(folder: Path, text: str, name: str = "fed.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_paths_from_the_files_folder(tmp_path: Path) -> None:
    config = load(write(tmp_path, LEAST + "[output]\nfolder = '/abs/out'\n"))
    assert config.model.path == str(tmp_path / "m") and config.data.path == str(tmp_path / "d.jsonl")
    assert config.client.memory == str(tmp_path / "client-state") and config.output.folder == "/abs/out"
    assert config.messages.preset == "fstq" and config.server.rounds == 10


def test_flowers_run_configuration_gives_the_same(tmp_path: Path) -> None:
    more = "[strategy]\nfraction_train = 0.5\n[messages]\nbytes = 900\n[server]\nenough = 3\ntimeout = 5\n"
    config = load(write(tmp_path, LEAST + more))
    assert from_flower(config.flat()) == config
    assert config.server.timeout == 5.0 and isinstance(config.server.timeout, float)


def test_a_data_set_of_the_hub_is_no_path(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST.replace("path = 'd.jsonl'", "path = 'owner/name#train'\nkind = 'hub'"))
    assert load(path).data.path == "owner/name#train"


@pytest.mark.parametrize("relative", [True, False])
def test_a_new_project_names_what_the_arguments_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    start = "" if relative else f"{tmp_path}/here/"
    new(Path("sub/app"), model=f"{start}m", data=f"{start}../rows.jsonl")
    monkeypatch.chdir("/")
    config = load(tmp_path / "here/sub/app/pyproject.toml")
    assert Path(config.model.path).resolve() == tmp_path / "here/m"
    assert Path(config.data.path).resolve() == tmp_path / "rows.jsonl"


def test_what_is_no_table_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[model\] is 3, expected a table"):
        load(write(tmp_path, "model = 3\n[data]\npath = 'd'\n"), {"model.rank": 4})
    with pytest.raises(ConfigError, match=r"\[tool.flwr.app.config\] is 3, expected tables"):
        load(write(tmp_path, "[tool.flwr.app]\nconfig = 3\n", "pyproject.toml"))


def test_pyproject(tmp_path: Path) -> None:
    text = "[project]\nname = 'x'\n" + LEAST.replace("[", "[tool.flwr.app.config.")
    assert load(write(tmp_path, text, "pyproject.toml")).model.path == str(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"\[tool.flwr.app.config\]: \[model\] has an unknown key 'pth'"):
        load(write(tmp_path, text.replace("path = 'm'", "path = 'm'\npth = 1"), "pyproject.toml"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[modle]\npath = 'x'\n", r"unknown table 'modle'; did you mean 'model'\?"),
        ("[train]\nstep = 3\n", r"\[train\] has an unknown key 'step'; did you mean 'steps'\?"),
        ("[train]\nsteps = 0\n", r"\[train\] steps is 0, expected a number at least 1"),
        ("[train]\nsteps = 1.5\n", r"\[train\] steps is 1.5, expected a whole number"),
        ("[train]\nsteps = true\n", r"\[train\] steps is True, expected a whole number"),
        ("[train]\nlearning_rate = nan\n", r"learning_rate is nan, expected a number above 0"),
        ("[train]\nlearning_rate = 'big'\n", r"learning_rate is 'big', expected a number"),
        ("[tokens]\nkeep = 1.5\n", r"\[tokens\] keep is 1.5, expected a number at most 1 .*|.*above 0 and at most 1"),
        ("[messages]\npreset = 'fst'\n", r"\[messages\] preset is 'fst'; did you mean 'fstq'\?"),
        ("[messages]\nlowest = 5000\nhighest = 4000\n", "lowest is above highest"),
        (
            "[messages]\npreset = 'mosaic'\n[server]\nstrategy = 'MultiKrum'\n",
            r"preset is 'mosaic', but MultiKrum",
        ),
        ("[server]\nstrategy = 'FedAvgg'\n", r"\[server\] strategy is 'FedAvgg'; did you mean 'FedAvg'\?"),
        ("[strategy]\nfraction_trian = 0.5\n", r"\[strategy\] has an unknown key 'fraction_trian' for FedAvg; did you"),
        ("[strategy]\nfraction_train = 'half'\n", r"\[strategy\] fraction_train is 'half', expected float"),
        ("[strategy]\nfraction_train = [1]\n", r"\[strategy\] fraction_train is \[1\]"),
        ("[strategy]\nweighted_by_key = 'x'\n", "unknown key 'weighted_by_key'"),
        ("[privacy]\nkind = 'serverfixed'\n", r"\[privacy\] kind is 'serverfixed'; did you mean 'server-fixed'\?"),
        ("train = 3\n", r"\[train\] is 3, expected a table"),
        ("[output", "not valid TOML"),
    ],
)
def test_refusals(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path, (text + LEAST) if text.startswith("train") else LEAST + text)
    with pytest.raises(ConfigError, match=match) as found:
        load(path)
    assert str(path) in str(found.value)


def test_missing_keys_files_and_changes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[data\] lacks the key 'path', expected text"):
        load(write(tmp_path, "[model]\npath = 'm'\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="more than"):
        load(write(tmp_path, LEAST + "#" * (1 << 20)))
    path = write(tmp_path, LEAST)
    assert load(path, dict([parse_change("server.rounds=3"), parse_change("data.path=other")])).server.rounds == 3
    with pytest.raises(ConfigError, match=r"SECTION\.KEY"):
        parse_change("rounds=3")
    with pytest.raises(ConfigError, match=r"SECTION\.KEY"):
        nested({"rounds": 3}, "here")
    with pytest.raises(ConfigError, match="unknown key 'round'"):
        load(path, {"server.round": 3})


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.recursive(st.integers() | st.text() | st.booleans() | st.floats(),
                                                         lambda inner: st.dictionaries(st.text(), inner), max_leaves=5),
                       max_size=4))  # fmt: skip
def test_anything_else_is_a_config_error(tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_flower(tables)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_made(tmp_path: Path, name: str) -> None:
    needed = {"QFedAvg": "client_learning_rate = 0.1\n", "FedProx": "proximal_mu = 0.1\n"}.get(name, "")
    config = load(write(tmp_path, LEAST + f"[server]\nstrategy = '{name}'\n[strategy]\nfraction_train = 1\n{needed}"))
    assert type(make(name, config.strategy)).__name__ == name
