"""The federated part of the loop: its configuration, its run in an environment that has Flower, its bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fstq_export.demo.loop_data import CLIENT
from fstq_infer.atomic import replace_file
from fstq_infer.errors import OptionError, StateError

CONFIG, FOLDER = "federation.toml", "federation"
MARKS = ("rounds.jsonl", "server.safetensors", "clients", "adapter")  # one of them is in every such folder


@dataclass(frozen=True, slots=True)
class Federation:
    """Settings of the run. budget: most bytes of a message; preset: of messages, lossless is FedAvg in float32."""

    clients: int = 3
    rounds: int = 8
    steps: int = 20
    batch: int = 16
    learning_rate: float = 4e-3
    rank: int = 8
    preset: str = "fstq"
    budget: int = 16_384

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps, self.batch, self.rank, self.budget) < 1 or self.learning_rate <= 0:
            raise OptionError(
                f"rounds {self.rounds}, steps {self.steps}, batch {self.batch}, rank {self.rank}, "
                f"budget {self.budget}, learning rate {self.learning_rate:g}: expected numbers above 0"
            )

    def config(self, model: Path, data: Path) -> str:
        """The configuration that ``fstq fed run`` reads, in TOML; docs/federated.md has its keys."""
        budget = "" if self.preset == "lossless" else f"bytes = {self.budget}\n"
        return (
            f"[model]\npath = {json.dumps(str(model), ensure_ascii=False)}\nrank = {self.rank}\n\n"
            f'[data]\npath = {json.dumps(str(data / CLIENT), ensure_ascii=False)}\npartition = "own"\nholdout = 0.0\n\n'
            f"[train]\nsteps = {self.steps}\nbatch = {self.batch}\nlearning_rate = {self.learning_rate}\n\n"
            f"[messages]\npreset = {json.dumps(self.preset)}\n{budget}\n"
            f"[server]\nrounds = {self.rounds}\n\n"
            "[strategy]\nfraction_evaluate = 0.0\n\n"  # a start of a process for each client and round less
            f"[simulation]\nclients = {self.clients}\n\n"
            f'[output]\nfolder = "{FOLDER}"\nsave_every = 0\n\n[client]\nmemory = "{FOLDER}/clients"\n'
        )


def run(out: Path, model: Path, data: Path, wanted: Federation, python: Path, supernodes: bool) -> dict[str, Any]:
    """Run the federation in ``out`` and return its figures; ``adapter`` in them is PEFT's folder.

    python: interpreter of an environment with the 'federated' extra; its progress goes to this process' terminal.
    supernodes: real processes of Flower; else all clients in one process. Raises StateError where it fails.
    """
    if not python.exists():
        raise OptionError(f"there is no interpreter {python}. 'make loop' makes one that has Flower.")
    clear(out / FOLDER)
    out.mkdir(parents=True, exist_ok=True)
    place = out / CONFIG
    replace_file(place, wanted.config(model.absolute(), data.absolute()).encode())
    command = [
        str(python.absolute()),
        "-m",
        "fstq_infer",
        "fed",
        "run",
        str(place),
        *(["--supernodes"] if supernodes else []),
    ]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        end(process)
        raise
    if code:
        raise StateError(f"the federation ended with {code}; above it says why. Run again: {' '.join(command)}")
    return figures(out / FOLDER)


def clear(folder: Path) -> None:
    """Remove what an earlier federation left; OptionError for a folder that none has written."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OptionError(f"{folder} is no folder of a federation; name another place with --out")
    if not folder.exists():
        return
    if any(folder.iterdir()) and not any((folder / name).exists() for name in MARKS):
        raise OptionError(f"{folder} holds something else than a federation; name another place with --out")
    shutil.rmtree(folder)


def end(process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Ask a process to end, and wait until it has ended what it started itself; kill it after ``seconds``."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def figures(folder: Path) -> dict[str, Any]:
    """What a finished federation sent, beside the same replies with weights in float32."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    adapter = folder / "adapter"
    replies = sum(line["used"] for line in lines)
    whole = 4 * weights_of(adapter / "adapter_model.safetensors")
    sent = sum(line["bytes_up"] for line in lines)
    return {
        "adapter": str(adapter),
        "rounds": len(lines),
        "replies": replies,
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "bytes_up": sent,
        "bytes_up_fp32": replies * whole,
        "times_less": round(replies * whole / sent, 1),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "loss": [line["loss"] for line in lines],
    }


def weights_of(path: Path) -> int:
    """Number of weights in a file of safetensors."""
    from safetensors.numpy import load_file

    return sum(int(array.size) for array in load_file(path).values())
