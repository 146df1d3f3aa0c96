"""``fstq fed run`` and ``fstq fed new``. Prints for people, or JSON for programs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fstq_infer.errors import OptionError
from fstq_infer.federated.app import privacy
from fstq_infer.federated.app.config import Config, load
from fstq_infer.federated.app.project import HEAD, MODULE
from fstq_infer.federated.app.server import ADAPTER
from fstq_infer.federated.app.simulate import simulate
from fstq_infer.federated.app.sinks import Figures, names_of, read_lines
from fstq_infer.federated.app.supernodes import run_on_supernodes
from fstq_infer.federated.app.tables import parse_change
from fstq_infer.lazy import load as load_name
from fstq_infer.terminal import notes, out


def run(path: Path, *, resume: bool, changes: Sequence[str], json: bool, supernodes: bool = False) -> None:
    """``fstq fed run``."""
    config = load(path, dict(parse_change(text) for text in changes))
    privacy.check(config)
    names_of(config.output.sinks)
    _quieten()
    began = time.monotonic()
    with _bar(json) as bar:
        task = bar.add_task("", total=config.server.rounds, figures="loading")

        def progress(round: int, figures: Figures) -> None:
            bar.update(task, completed=round, figures=line_of(round, figures))

        (run_on_supernodes if supernodes else simulate)(config, resume, progress)
    summary = summary_of(config, time.monotonic() - began)
    if json:
        out.data(summary)
        return
    last = summary["last"]
    out.print(f"{summary['rounds']} rounds, {line_of(summary['rounds'], last)}" if last else "nothing was left to do")
    out.print(f"sent: {summary['bytes_up']:,} bytes up in messages, {summary['bytes_down']:,} bytes of weights down")
    out.print(f"adapter: {summary['adapter']}")


def summary_of(config: Config, seconds: float) -> dict[str, Any]:
    """What a run came to, of all its rounds, earlier runs of a resumed one included."""
    folder = Path(config.output.folder)
    lines = read_lines(folder / "rounds.jsonl")
    return {
        "adapter": str(folder / ADAPTER),
        "rounds": len(lines),
        "seconds": round(seconds, 3),
        "bytes_up": sum(int(line["bytes_up"]) for line in lines),
        "bytes_down": sum(int(line["bytes_down"]) for line in lines),
        "last": lines[-1] if lines else None,
    }


def line_of(round: int, figures: Figures) -> str:
    """One round in a line."""
    losses = [
        f"{label} {value:.4f}"
        for label, value in (("loss", figures["loss"]), ("held-out", figures["held_out_loss"]))
        if value is not None
    ]
    counts = f"{figures['used']} of {figures['clients']} clients"
    return ", ".join([f"round {round}", *losses, counts, f"{figures['bytes_up']:,} bytes up"])


def new(folder: Path, *, model: str, data: str) -> None:
    """``fstq fed new``. Relative paths are from the working directory; those in the file, from its folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise OptionError(f"{folder} cannot be made: {error.strerror}. Name a new folder.") from error
    if used:
        raise OptionError(f"{folder} is not empty. Name a new folder.")
    text = PROJECT.format(name=_name(folder), model=_from(folder, model), data=_from(folder, data))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    (folder / "fstq_app.py").write_text(MODULE, encoding="utf-8")
    out.print(f"{folder / 'pyproject.toml'}: edit it, then 'fstq fed run {folder / 'pyproject.toml'}' on this machine,")
    out.print(f"or 'flwr run {folder}' with Flower")


def _quieten() -> None:
    """Flower and Transformers say what they do only where --verbose asks for it."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.getLogger("flwr").setLevel(logging.WARNING)
        load_name("transformers.utils.logging:disable_progress_bar", "fstq fed", "federated")()


def _bar(quiet: bool) -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=notes,
        disable=quiet or not notes.is_terminal,
    )


def _name(folder: Path) -> str:
    kept = "".join(letter if letter.isalnum() else "-" for letter in folder.absolute().name.lower()).strip("-")
    return kept or "federation"


def _from(folder: Path, path: str) -> str:
    place = Path(path).absolute()
    try:
        return _text(path if Path(path).is_absolute() else os.path.relpath(place, folder.resolve()))
    except ValueError:  # another drive
        return _text(str(place))


def _text(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


PROJECT = (
    HEAD
    + """
# All keys: docs/federated.md. What differs from device to device is in each SuperNode's --node-config.
[tool.flwr.app.config.model]
path = "{model}"
rank = 8

[tool.flwr.app.config.data]
path = "{data}"
partition = "iid"

[tool.flwr.app.config.train]
steps = 10
learning_rate = 1e-3

[tool.flwr.app.config.messages]
preset = "fstq"
seconds = 1.0

[tool.flwr.app.config.server]
strategy = "FedAvg"
rounds = 10

[tool.flwr.app.config.strategy]
fraction_train = 1.0

[tool.flwr.app.config.simulation]
clients = 4

[tool.flwr.app.config.output]
folder = "federation-out"
"""
)
