"""Uplink, rounds and time to the same held-out loss: our messages beside published ones, in one harness.

python bench/federated.py                       all methods, both tasks, three seeds; hours on one core, can be resumed
python bench/federated.py --task medquad --seeds 1 --methods fedavg,paper,mosaic
python bench/federated.py --report              results/federated.json and plots from what was run so far

Every method, dense FedAvg too, gets the best of --rates (local learning rates) by its last loss on seed 0.
Clients train one after the other; every message is really encoded, and its length counted.
Rounds to a loss are interpolated between evaluations; bytes are those sent in the rounds up to the one that reaches it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are loaded

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, shared
from fed_llama import LoraLlama, Work
from fed_methods import METHODS, Part, Sending
from fed_report import report
from fed_tasks import Task, load

from fstq_infer.atomic import replace_file
from fstq_infer.federated.feedback import State
from fstq_infer.federated.mosaic import complete
from fstq_infer.federated.network import Compute, Network, links
from fstq_infer.federated.network import Work as Load
from fstq_infer.federated.tensors import TensorManifest

PARTIAL = RESULTS / "federated-runs"
FLOWER = 795  # bytes around a message, measured with two metrics
STEP = 0.05  # seconds of a local step on a client, stated
RATES = (0.003, 0.006, 0.01, 0.02)


@dataclass(frozen=True)
class Setting:
    """One run. dropout, loss: of clients and of messages on their way back."""

    task: str
    method: str
    seed: int
    rate: float
    rounds: int
    steps: int = 5
    batch: int = 4
    clients: int = 20
    drawn: int = 10
    dropout: float = 0.1
    loss: float = 0.0
    network: str = "lte"

    @property
    def name(self) -> str:
        changed = f"{self.clients}c{self.drawn}" + f"-drop{self.dropout:g}" * (self.dropout != 0.1)
        changed += f"-loss{self.loss:g}" * (self.loss > 0) + f"-{self.network}" * (self.network != "lte")
        return f"{self.task}-{self.method}-seed{self.seed}-rate{self.rate:g}-steps{self.steps}-{changed}"


def run(model: LoraLlama, task: Task, setting: Setting, folder: Path) -> dict[str, Any]:
    """All rounds of a setting, going on where an earlier run was cut off."""
    path, method = folder / f"{setting.name}.json", METHODS[setting.method]
    trained = model.parts(method.parts)
    manifest = TensorManifest(tuple(item for item in model.manifest.tensors if item[0] in trained))
    kept = np.isin(model.names, trained)
    mask, places = torch.from_numpy(kept.astype(np.float32)), np.flatnonzero(kept)
    network = Network(
        links(setting.network, len(task.clients), setting.seed),
        Compute(STEP, 0.3),
        setting.dropout,
        setting.loss,
        seed=setting.seed,
    )
    record, server = _begin(path, model, task, setting)
    for number in range(len(record["rounds"]), setting.rounds + 1):
        drawn = np.random.default_rng((setting.seed, 1, number)).permutation(len(task.clients))[: setting.drawn]
        parts, work = dict[int, Part](), dict[int, Load]()
        for slot, client in enumerate(drawn.tolist()):
            gone, lost = network.fate(number, client)
            if gone:
                work[client] = Load(4 * len(places) + FLOWER, 0, setting.steps)
                continue
            delta, fisher = model.train(
                server.weights, task.clients[client], Work(setting.steps, setting.batch, setting.rate),
                (setting.seed, 2, number, client), mask,
            )  # fmt: skip
            at = Sending(manifest, fisher[places], server.state(client), number, slot, len(drawn))
            blob, part, state = method.codec(delta[places], at)
            work[client] = Load(4 * len(places) + FLOWER, len(blob) + FLOWER, setting.steps)
            if lost and state.residual is not None:  # as fstq_mod does when its message was not used
                state = State(state.residual + _dense(part, len(places)), state.velocity)
            server.states[client] = state
            if not lost:
                parts[client] = part
        passed = network.round(number, work)
        if parts:
            held = complete(list(parts.values()), len(places))
            server.step(places, np.mean(held, axis=0, dtype=np.float64), method.momentum, method.server)
        loss = model.evaluate(server.weights, task.held_out)
        before, sizes = record["rounds"][-1], [one.uplink - FLOWER for one in work.values() if one.uplink]
        record["rounds"].append(
            {
                "round": number,
                "loss": round(loss, 5),
                "bytes": before["bytes"] + sum(sizes),
                "seconds": round(before["seconds"] + passed.seconds, 4),
                "joules": round(before["joules"] + passed.joules, 4),
                "messages": len(sizes),
                "used": len(parts),
            }
        )
        if number % 5 == 0 or number == setting.rounds:
            _save(path, record, server)
            print(f"{setting.name} round {number} loss {loss:.4f} bytes {record['rounds'][-1]['bytes']:,}", flush=True)
    return record


@dataclass
class Server:
    """Weights, FedAvgM's momentum, and what clients remember."""

    weights: torch.Tensor
    velocity: Any
    states: dict[int, State]

    def state(self, client: int) -> State:
        return self.states.get(client, State())

    def step(self, places: Any, update: Any, momentum: float, rate: float) -> None:
        self.velocity[places] = momentum * self.velocity[places] + update
        self.weights = self.weights + torch.from_numpy((rate * self.velocity).astype(np.float32))


def _begin(path: Path, model: LoraLlama, task: Task, setting: Setting) -> tuple[dict[str, Any], Server]:
    saved = path.with_suffix(".npz")
    if path.exists() and saved.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        with np.load(saved, allow_pickle=False) as arrays:
            if int(arrays["rounds"]) == len(record["rounds"]):
                states = {
                    int(key[1:]): State(arrays[key]) for key in arrays if key.startswith("r") and key[1:].isdigit()
                }
                return record, Server(torch.from_numpy(arrays["weights"]), arrays["velocity"], states)
    weights = model.start(setting.seed)
    first = {"round": 0, "loss": round(model.evaluate(weights, task.held_out), 5), "bytes": 0, "seconds": 0.0}
    record = {"setting": vars(setting), "rounds": [{**first, "joules": 0.0, "messages": 0, "used": 0}]}
    return record, Server(weights, np.zeros(len(weights)), {})


def _save(path: Path, record: dict[str, Any], server: Server) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    residuals = {f"r{client}": state.residual for client, state in server.states.items() if state.residual is not None}
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial, rounds=len(record["rounds"]), weights=server.weights.numpy(), velocity=server.velocity, **residuals
    )
    partial.replace(path.with_suffix(".npz"))
    replace_file(path, json.dumps(record).encode())


def _dense(part: Part, total: int) -> Any:
    return complete([part], total)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="medquad,xquad")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates", default=",".join(map(str, RATES)), help="of which each method takes its best on seed 0"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--network", default="lte", choices=("lte", "fixed"))
    parser.add_argument("--runs", type=Path, default=PARTIAL, help="folder of runs, finished or not")
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args()
    if not given.report:
        torch.set_num_threads(1)
        model = LoraLlama(shared("models/stories260k"))
        rates = [float(rate) for rate in given.rates.split(",")]
        for name in given.task.split(","):
            for seed in range(given.seeds):
                task = load(name, given.clients, seed)
                for method in given.methods.split(","):
                    common = (given.rounds, given.steps, 4, given.clients, 10, given.dropout, given.loss, given.network)
                    best = rates if seed == 0 else [_best(given.runs, name, method, common, rates)]
                    for rate in best:
                        run(model, task, Setting(name, method, seed, rate, *common), given.runs)
    report(given.runs)


def _best(folder: Path, task: str, method: str, common: Any, rates: list[float]) -> float:
    """The rate with the lowest loss at the end on seed 0."""
    ends = {}
    for rate in rates:
        path = folder / f"{Setting(task, method, 0, rate, *common).name}.json"
        ends[rate] = json.loads(path.read_text(encoding="utf-8"))["rounds"][-1]["loss"]
    return min(ends, key=ends.__getitem__)


if __name__ == "__main__":
    main()
