"""Uplink, rounds and time to the same held-out loss: our messages beside published ones, in one harness.

python bench/federated.py                       all methods, both tasks, three seeds; hours on one core, can be resumed
python bench/federated.py --task medquad --seeds 0 --methods fedavg,paper,mosaic
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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, shared
from fed_llama import LoraLlama, Work
from fed_methods import METHODS, Part, Sending
from fed_report import report
from fed_server import Clients, Files, Server
from fed_tasks import Task, load

from fstq_infer.federated.downlink import Downlink
from fstq_infer.federated.feedback import State
from fstq_infer.federated.mosaic import complete
from fstq_infer.federated.network import Compute, Network, Passed, links
from fstq_infer.federated.network import Work as Load
from fstq_infer.federated.tensors import TensorManifest
from fstq_infer.federated.tokens import TokenSettings

PARTIAL = RESULTS / "federated-runs"
FLOWER = 795  # bytes around a message, measured with two metrics
STEP = 0.05  # seconds of a local step on a client, stated
RATES = (0.006, 0.01, 0.02)
FIGURES = ("round", "bytes", "down", "seconds", "joules", "messages", "used")


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


def run(model: LoraLlama, task: Task, setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """All rounds of a setting, going on where an earlier run was cut off."""
    method, files, total = METHODS[setting.method], Files(folder, setting.name), len(task.clients)
    trained = model.parts(method.parts)
    manifest = TensorManifest(tuple(item for item in model.manifest.tensors if item[0] in trained))
    kept = np.isin(model.names, trained)
    mask, places = torch.from_numpy(kept.astype(np.float32)), np.flatnonzero(kept)
    tokens = TokenSettings(method.tokens, every=setting.steps) if method.tokens < 1 else None
    clients = Clients(files.clients, manifest, tokens, len(model.embedding))
    downlink = Downlink("fstq", method.downlink, drawn=True) if method.downlink else None
    server = Server(model.start(setting.seed), places, manifest, method.average, downlink)
    network = Network(
        links(setting.network, total, setting.seed), Compute(STEP, 0.3), setting.dropout, setting.loss,
        seed=setting.seed,
    )  # fmt: skip
    if not files.load(server):
        loss = round(model.evaluate(server.weights, task.held_out), 5)
        server.rounds.append(dict.fromkeys(FIGURES, 0) | {"loss": loss})
    began = time.monotonic()
    for number in range(len(server.rounds), setting.rounds + 1):
        drawn = np.random.default_rng((setting.seed, 1, number)).permutation(total)[: setting.drawn].tolist()
        start = server.sent()
        work = {client: Load(server.bytes_for(client) + FLOWER, 0, setting.steps) for client in drawn}
        here = [client for client in drawn if not network.fate(number, client)[0]]
        scores = [clients.scores(client, number) for client in here]
        deltas, fishers = model.train(
            start, [task.clients[client] for client in here], Work(setting.steps, setting.batch, setting.rate),
            [(setting.seed, 2, number, client) for client in here], mask, scores if tokens else None,
        )  # fmt: skip
        parts = list[Part]()
        for client, delta, fisher, score in zip(here, deltas[:, places], fishers[:, places], scores, strict=True):
            at = Sending(manifest, fisher, clients.state(client, number), number, drawn.index(client), len(drawn))
            blob, part, state = method.codec(delta, at)
            work[client] = Load(work[client].downlink, len(blob) + FLOWER, setting.steps)
            if not network.fate(number, client)[1]:
                parts.append(part)
                server.heard(client)
            elif state.residual is not None:  # as fstq_mod does when its message was not used
                state = State(state.residual + complete([part], len(places))[0], state.velocity)
            clients.save(client, state, score, number)
        passed = network.round(number, work)
        if parts:
            held = complete(parts, len(places), method.senders)
            server.step(np.mean(held, axis=0, dtype=np.float64), method.momentum, method.server)
        loss = model.evaluate(server.delivered(), task.held_out)
        _note(server.rounds, loss, passed, work, len(parts))
        files.save(server, vars(setting))
    last, spent = server.rounds[-1], time.monotonic() - began
    print(f"{setting.name}: round {last['round']}, loss {last['loss']:.4f}, {last['bytes']:,} bytes, {spent:.0f} s")
    return server.rounds


def _note(rounds: list[dict[str, Any]], loss: float, passed: Passed, work: dict[int, Load], used: int) -> None:
    """Add a round: all figures but loss, messages and used are sums since the start. bytes: of messages alone."""
    before, sizes = rounds[-1], [one.uplink - FLOWER for one in work.values() if one.uplink]
    rounds.append(
        {
            "round": before["round"] + 1,
            "loss": round(loss, 5),
            "bytes": before["bytes"] + sum(sizes),
            "down": before["down"] + sum(one.downlink - FLOWER for one in work.values()),
            "seconds": round(before["seconds"] + passed.seconds, 4),
            "joules": round(before["joules"] + passed.joules, 4),
            "messages": len(sizes),
            "used": used,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="medquad,xquad")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="tried on seed 0; others take the best")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--drawn", type=int, default=10, help="clients of a round")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--network", default="lte", choices=("lte", "fixed"))
    parser.add_argument("--runs", type=Path, default=PARTIAL, help="folder of runs, finished or not")
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args()
    if not given.report:
        _run_all(given)
    report(given.runs)


def _run_all(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = LoraLlama(shared("models/stories260k"))
    common = (given.rounds, given.steps, 4, given.clients, given.drawn, given.dropout, given.loss, given.network)
    for name in given.task.split(","):
        for seed in map(int, given.seeds.split(",")):
            task = load(name, given.clients, seed)
            for method in given.methods.split(","):
                rates = [float(rate) for rate in given.rates.split(",")]
                for rate in rates if seed == 0 else [_best(given.runs, name, method, common, rates)]:
                    run(model, task, Setting(name, method, seed, rate, *common), given.runs)


def _best(folder: Path, task: str, method: str, common: Any, rates: list[float]) -> float:
    """The rate with the lowest loss on seed 0, of those that were tried there."""
    ends = {}
    for rate in rates:
        path = folder / f"{Setting(task, method, 0, rate, *common).name}.json"
        if path.exists():
            ends[rate] = min(one["loss"] for one in json.loads(path.read_text(encoding="utf-8"))["rounds"])
    if not ends:
        raise SystemExit(f"{method} on {task} was not run on seed 0, which chooses its rate. Add 0 to --seeds.")
    return min(ends, key=ends.__getitem__)


if __name__ == "__main__":
    main()
