"""Where the figures of each round go: JSON lines always, trackers by name. A tracker is one class and one row here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fstq_infer.atomic import replace_file
from fstq_infer.errors import OptionError, StateError, suggestion
from fstq_infer.lazy import load

Figures = Mapping[str, float | int | None]


class Sink(Protocol):
    """Takes the figures of rounds in their order; ``round`` is not among them."""

    def write(self, round: int, figures: Figures) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One object a line. Lines of the first round that is written, and of later ones, are of a run that was cut off:
    they are removed."""

    def __init__(self, path: Path) -> None:
        self.path, self._begun = path, False

    def write(self, round: int, figures: Figures) -> None:
        """Add a line. Raises StateError where the file cannot be written."""
        line = json.dumps({"round": round, **figures}) + "\n"
        try:
            if not self._begun:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._drop_from(round)
                self._begun = True
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StateError(f"{self.path} cannot be written: {error}. Check permissions and free space.") from error

    def close(self) -> None:
        """Nothing is open between rounds."""

    def _drop_from(self, round: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines(True) if _round_in(line) < round]
        replace_file(self.path, "".join(kept).encode())


class TensorBoard:
    """Scalars for ``tensorboard --logdir FOLDER``."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        writer = load("torch.utils.tensorboard:SummaryWriter", "sink 'tensorboard'", "tensorboard")
        self._writer = writer(str(folder / "tensorboard"))

    def write(self, round: int, figures: Figures) -> None:
        """One scalar for each figure."""
        for name, value in _known(figures).items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; offline where its environment says so (``WANDB_MODE=offline``)."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        init = load("wandb:init", "sink 'wandb'", "wandb")
        self._run = init(project=project, dir=str(folder), config=dict(settings))

    def write(self, round: int, figures: Figures) -> None:
        """One step."""
        self._run.log(dict(_known(figures)), step=round)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at the tracking server of its environment, or else in the folder."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        client = load("mlflow:MlflowClient", "sink 'mlflow'", "mlflow")
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        self._client = client(tracking_uri=place)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._run = self._client.create_run(experiment).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, value)

    def write(self, round: int, figures: Figures) -> None:
        """One metric for each figure."""
        for name, value in _known(figures).items():
            self._client.log_metric(self._run, name, value, step=round)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


SINKS: Mapping[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def names_of(text: str) -> list[str]:
    """Names of sinks with commas. Raises OptionError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SINKS:
            raise OptionError(f"[output] sinks names {name!a}; {suggestion(name, SINKS)}")
    return names


def open_sinks(folder: Path, text: str, project: str, settings: Mapping[str, Any]) -> list[Sink]:
    """JSON lines in ``folder``/rounds.jsonl, and the trackers that are named."""
    folder.mkdir(parents=True, exist_ok=True)
    return [JsonLines(folder / "rounds.jsonl"), *(SINKS[name](folder, project, settings) for name in names_of(text))]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What JsonLines has written, oldest first, without a last line that is being written, or was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _known(figures: Figures) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None}


def _round_in(line: str) -> float:
    """The round of a line; above all of them for one that was cut off."""
    try:
        return int(json.loads(line)["round"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
