"""A thousand clients on this machine: memory, disk and seconds of a round, by the number of clients that take part.

python bench/fed_scale.py     stories260k on MedQuAD through `fstq fed run`'s own code; some minutes on one core

What clients remember lies on disk (preset fstq: residual and Fisher). Seconds are those of this process's processor
time, so that what else runs on the machine does not count. Writes results/federated-scale.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are loaded

import argparse
import logging
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import shared, target, write

from fstq_infer.federated.app.config import load
from fstq_infer.federated.app.simulate import simulate

MOST_MEMORY = 2 << 30
LEAST_FIT = 0.98  # of a straight line: 1 - residual variance / variance


def measure(clients: int, drawn: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One federation. The first round, in which the model is loaded, is left out of its seconds."""
    path, ticks = folder / f"{drawn}.toml", list[float]()
    path.write_text("", encoding="utf-8")
    changes = {
        "model.path": str(shared("models/stories260k")),
        "data.path": str(shared("data/medquad/medquad_train.jsonl.gz")),
        "data.kind": "medquad",
        "data.partition": "dirichlet:0.1",
        "data.max_tokens": 64,
        "data.learn": "all",
        "data.holdout": 0.0,
        "train.steps": 2,
        "train.batch": 4,
        "messages.preset": "fstq",
        "messages.bytes": 2048,
        "server.rounds": rounds,
        "strategy.fraction_train": drawn / clients,
        "strategy.fraction_evaluate": 0.0,
        "simulation.clients": clients,
        "client.memory": str(folder / f"{drawn}-state"),
        "output.folder": str(folder / f"{drawn}-out"),
        "output.save_every": 0,
    }
    simulate(load(path, changes), progress=lambda number, figures: ticks.append(time.process_time()))
    state = list((folder / f"{drawn}-state").glob("*"))
    return {
        "clients": clients,
        "drawn": drawn,
        "rounds": rounds,
        "cpu_seconds_of_a_round": round(float(np.median(np.diff(ticks))), 4),
        "peak_bytes_of_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_of_state_on_disk": sum(file.stat().st_size for file in state),
        "clients_with_state": len({file.name.rsplit("-", 1)[0] for file in state}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--drawn", default="5,10,20,40")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(given.clients, int(drawn), given.rounds, Path(folder)) for drawn in given.drawn.split(",")]
    drawn, seconds = (np.array([row[key] for row in rows], float) for key in ("drawn", "cpu_seconds_of_a_round"))
    slope, start = np.polyfit(drawn, seconds, 1)
    fit = 1 - float(np.var(seconds - slope * drawn - start) / np.var(seconds))
    print(f"a round takes {start:.3f} s and {slope:.4f} s for each client that takes part")
    peak = max(row["peak_bytes_of_memory"] for row in rows)
    write(
        "federated-scale",
        "python bench/fed_scale.py",
        rows,
        {
            "fit of a straight line through seconds by participants": target(fit, LEAST_FIT),
            "peak memory, bytes": target(peak, MOST_MEMORY, at_least=False),
        },
    )


if __name__ == "__main__":
    main()
