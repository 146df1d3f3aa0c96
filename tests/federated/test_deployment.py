"""Real processes of Flower: TLS, authenticated nodes, one of them killed and restarted in the middle of a round."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="a deployment needs the 'federated' extra")
pytest.importorskip("constriction", reason="messages need the 'federated' extra")
pytest.importorskip("peft", reason="training needs the 'federated' extra")

from peft import PeftModel
from transformers import AutoModelForCausalLM

from fstq_infer.federated.app.certificates import write_key
from fstq_infer.federated.app.command import new
from fstq_infer.federated.app.loopback import LINK, Loopback
from fstq_infer.federated.app.sinks import read_lines
from tests.federated.tiny import save_model, save_rows

NODES, ROUNDS = 3, 3


def write_app(folder: Path) -> Path:
    for node in range(NODES):
        save_rows(folder / f"rows-{node}.jsonl", 16)
    new(folder / "app", model=str(save_model(folder / "model")), data=str(folder / "rows-{client}.jsonl"))
    project = folder / "app/pyproject.toml"
    text = project.read_text(encoding="utf-8")
    for old, fresh in (
        ("rounds = 10", f"rounds = {ROUNDS}\ntimeout = 300.0"),
        ('partition = "iid"', 'partition = "own"'),
        ('"federation-out"', f'"{folder}/out"'),
        (
            "fraction_train = 1.0",
            f"fraction_evaluate = 0.0\nmin_train_nodes = {NODES}\nmin_available_nodes = {NODES}",
        ),
    ):
        assert old in text
        text = text.replace(old, fresh)
    project.write_text(text, encoding="utf-8")
    return folder / "app"


@pytest.mark.slow
def test_a_node_is_killed_and_restarted_in_the_middle_of_a_run(tmp_path: Path) -> None:
    app = write_app(tmp_path)
    with Loopback(tmp_path) as deployed:
        deployed.superlink()
        settings = [
            f'client-id="{node}" fstq-uplink={20_000 * (node + 1)} fstq-memory="{tmp_path}/memory{node}"'
            for node in range(NODES)
        ]
        for node in range(NODES):
            deployed.supernode(f"node{node}", settings[node])
        deployed.flwr("run", str(app), LINK)
        deployed.wait(lambda: "Receiving: train message" in deployed.log("node2"), 180)
        deployed.kill("node2")

        def over() -> bool:
            deployed.restarted("node2", settings[2])
            return (tmp_path / "out/adapter").exists()

        deployed.wait(over, 900, pause=5)
    rounds = read_lines(tmp_path / "out/rounds.jsonl")
    assert [line["round"] for line in rounds] == list(range(1, ROUNDS + 1))
    assert rounds[0]["used"] == NODES - 1 and rounds[0]["dropped"] == 1 and rounds[-1]["used"] == NODES
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert all(0 < line["bytes_up"] < line["bytes_down"] for line in rounds)
    for node in range(NODES):
        assert list((tmp_path / f"memory{node}").glob("*.safetensors"))
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(tmp_path / "out/adapter")
    )
    assert tuned.peft_config["default"].r == 8


@pytest.mark.slow
def test_a_node_without_a_registered_key_is_turned_away(tmp_path: Path) -> None:
    with Loopback(tmp_path) as deployed:
        deployed.superlink()
        write_key(tmp_path / "stranger")
        deployed.supernode("stranger", "partition-id=0", register=False)
        deployed.wait(lambda: deployed.processes["stranger"].poll() is not None, 120)
        assert deployed.processes["stranger"].returncode != 0
