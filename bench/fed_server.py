"""The server of bench/federated.py and what clients remember, on disk after every round so that runs can go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fstq_infer.atomic import replace_file
from fstq_infer.errors import StateError
from fstq_infer.federated import saved
from fstq_infer.federated.downlink import Downlink
from fstq_infer.federated.feedback import State
from fstq_infer.federated.memory import Memory, MemoryFolder
from fstq_infer.federated.tensors import TensorManifest
from fstq_infer.federated.tokens import TokenFolder, TokenScores, TokenSettings

BASE = bytes(16)
RUN = "bench"


@dataclass
class Server:
    """Weights (N,), of which those at ``places`` are trained, FedAvgM's velocity, and a running mean of the weights.

    average: 0 for the last weights, else the exponent of Shamir and Zhang's mean (arXiv 1212.1824), in which the
    newest of t weights counts (1 + average) / (t + average). downlink: compressed, None for float32.
    """

    weights: torch.Tensor
    places: Any
    manifest: TensorManifest
    average: float
    downlink: Downlink | None
    velocity: Any = None
    mean: Any = None
    updates: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.velocity, self.mean = np.zeros(len(self.places)), np.zeros(len(self.places))

    def sent(self) -> torch.Tensor:
        """(N,) weights that clients train from."""
        if self.downlink is None:
            return self.weights
        self.downlink.advance(self.manifest.unflatten(self.weights.numpy()[self.places]), BASE)
        return self._with(self.manifest.flatten(self.downlink.weights))

    def bytes_for(self, client: int) -> int:
        """Of the weights in a request."""
        if self.downlink is None:
            return 4 * len(self.places)
        messages = self.downlink.messages_for(client)[1]
        return self.downlink.whole if messages is None else len(messages)

    def heard(self, client: int) -> None:
        """A client's reply arrived, so that the server knows what it holds."""
        if self.downlink is not None:
            self.downlink.heard(client, self.downlink.version)

    def step(self, update: Any, momentum: float, rate: float) -> None:
        """FedAvgM. update: (n,) mean of the clients' deltas."""
        self.velocity = momentum * self.velocity + update
        now = self.weights.numpy()[self.places] + (rate * self.velocity).astype(np.float32)
        self.weights, self.updates = self._with(now), self.updates + 1
        share = (1 + self.average) / (self.updates + self.average) if self.average else 1.0
        self.mean += share * (now - self.mean)

    def delivered(self) -> torch.Tensor:
        """(N,) weights that are evaluated."""
        return self._with(self.mean.astype(np.float32)) if self.updates else self.weights

    def _with(self, values: Any) -> torch.Tensor:
        whole = self.weights.clone()
        whole[self.places] = torch.from_numpy(np.ascontiguousarray(values))
        return whole


@dataclass(frozen=True)
class Files:
    """A run's files: NAME.json for reports, and the state to go on from."""

    folder: Path
    name: str

    @property
    def _state(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def clients(self) -> Path:
        """Folder of the clients' memories."""
        return self.folder / f"{self.name}.clients"

    def load(self, server: Server) -> bool:
        """Set a server to where it was; False, with no memories left, where there is nothing to go on from."""
        try:
            arrays, facts = saved.load(self._state)
            server.weights, server.velocity = torch.from_numpy(arrays["weights"]), arrays["velocity"]
            server.mean, server.updates, server.rounds = arrays["mean"], facts["updates"], facts["rounds"]
            if server.downlink is not None:
                server.downlink.restore({key[2:]: value for key, value in arrays.items() if key[:2] == "d "},
                                        facts["downlink"])  # fmt: skip
        except (FileNotFoundError, StateError, KeyError) as error:
            if not isinstance(error, FileNotFoundError):
                print(f"{self.name} begins anew: {error}")
            shutil.rmtree(self.clients, ignore_errors=True)
            return False
        return True

    def save(self, server: Server, setting: dict[str, Any]) -> None:
        """After a round."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays, told = server.downlink.state() if server.downlink else ({}, {})
        arrays = {f"d {name}": array for name, array in arrays.items()}
        arrays |= {"weights": server.weights.numpy(), "velocity": server.velocity, "mean": server.mean}
        saved.save(self._state, arrays, {"updates": server.updates, "rounds": server.rounds, "downlink": told})
        replace_file(
            self.folder / f"{self.name}.json", json.dumps({"setting": setting, "rounds": server.rounds}).encode()
        )


@dataclass(frozen=True)
class Clients:
    """What clients remember, as the product keeps it: residuals in fp16, scores of tokens."""

    folder: Path
    manifest: TensorManifest
    tokens: TokenSettings | None
    vocabulary: int

    def state(self, client: int, before: int) -> State:
        """Of an earlier round than ``before``."""
        return MemoryFolder(self.folder).load(str(client), self.manifest, BASE, RUN, before).state

    def scores(self, client: int, before: int) -> TokenScores | None:
        """None where all tokens count."""
        if self.tokens is None:
            return None
        return TokenFolder(self.folder).load(str(client), self.tokens, self.vocabulary, RUN, before)

    def save(self, client: int, state: State, scores: TokenScores | None, number: int) -> None:
        """What there is to remember of a round."""
        if state.residual is not None or state.velocity is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            MemoryFolder(self.folder).save(str(client), self.manifest, BASE, RUN, Memory(state, round=number))
        if scores is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            TokenFolder(self.folder).save(str(client), scores, RUN, number)
