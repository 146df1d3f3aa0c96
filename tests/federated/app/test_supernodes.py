"""``fstq fed run --supernodes``: the app it writes, and a run through processes of Flower that leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("flwr", reason="a deployment needs the 'federated' extra")
pytest.importorskip("flwr_datasets", reason="dividing rows needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")
pytest.importorskip("peft", reason="training needs the 'federated' extra")

from fstq_infer.federated.app.config import from_flower, load
from fstq_infer.federated.app.project import write_app
from fstq_infer.federated.app.supernodes import _failed, absolute
from tests.federated.tiny import save_model, save_rows

CLIENTS = 2
TOML = """
[model]
path = "model"
[data]
path = "rows-{client}.jsonl"
partition = "own"
[train]
steps = 2
[server]
rounds = 1
[strategy]
fraction_evaluate = 0.0
[simulation]
clients = 2
"""


def federation(folder: Path) -> Path:
    save_model(folder / "model")
    for client in range(CLIENTS):
        save_rows(folder / f"rows-{client}.jsonl", 12)
    (folder / "federation.toml").write_text(TOML)
    return folder / "federation.toml"


def test_the_app_has_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = federation(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = absolute(load(place.name), resume=True)
    assert config.server.resume and config.strategy["min_available_nodes"] == CLIENTS
    for path in (config.model.path, config.data.path, config.output.folder, config.client.memory):
        assert Path(path).is_absolute() and Path(path).parent == tmp_path
    write_app(tmp_path / "app", "loopback", config.flat())
    tables = tomllib.loads((tmp_path / "app/pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    assert from_flower(flat) == config


def test_strategies_of_the_configuration_keep_their_numbers(tmp_path: Path) -> None:
    config = load(federation(tmp_path), {"strategy.min_available_nodes": 1})
    assert absolute(config, False).strategy["min_available_nodes"] == 1


@pytest.mark.parametrize(
    ("status", "failed"), [("running", False), ("finished:completed", False), ("finished:failed", True)]
)
def test_a_failed_run_is_told_from_its_status(status: str, failed: bool) -> None:
    assert _failed(json.dumps({"success": True, "runs": [{"fab-id": "failed/app", "status": status}]})) is failed


@pytest.mark.slow
def test_a_run_through_supernodes(tmp_path: Path) -> None:
    place = federation(tmp_path)
    command = [sys.executable, "-m", "fstq_infer", "fed", "run", str(place), "--supernodes", "--json"]
    scratch = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["rounds"] == 1 and found["last"]["used"] == CLIENTS and found["bytes_up"] > 0
    assert (Path(found["adapter"]) / "adapter_model.safetensors").exists()
    left = subprocess.run(["pgrep", "-f", f"{tmp_path}/fstq-supernodes-"], capture_output=True, text=True)
    assert not left.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fstq_infer", "fed", "run", str(federation(tmp_path)), "--supernodes"]
    run = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        while not list(tmp_path.glob("fstq-supernodes-*/node0.log")):
            assert run.poll() is None
            time.sleep(0.2)
        run.send_signal(number)
        assert run.wait(300) == 130
    finally:
        run.kill()
    left = subprocess.run(["pgrep", "-f", f"{tmp_path}/fstq-supernodes-"], capture_output=True, text=True)
    assert not left.stdout and not list(tmp_path.glob("fstq-supernodes-*"))
