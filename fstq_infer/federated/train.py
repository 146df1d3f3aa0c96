"""Local training of a LoRA adapter on one client, with the Fisher of its parameters. Knows no Flower."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import MissingExtraError, OptionError
from fstq_infer.federated.embeddings import embedding_gradients
from fstq_infer.federated.tensors import HASH_BYTES
from fstq_infer.federated.tokens import TokenScores

try:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
except ModuleNotFoundError as error:
    raise MissingExtraError("training an adapter", error.name or "peft", "federated") from error

Floats = NDArray[np.float32]
IGNORED = -100  # label of a token without a loss
LINEARS = "all-linear"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one text, and for each token its label: itself, or IGNORED where nothing is to be learnt."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labels) or len(self.tokens) < 2:
            raise OptionError(
                f"an example has {len(self.tokens)} tokens and {len(self.labels)} labels, expected as many, at least 2"
            )


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """One client's work in one round. batch: examples of a micro-batch, ``accumulate`` of which make a step.

    fisher_decay: of the average of squared gradients over the steps. proximal: mu of FedProx, the pull to the weights
    that the round began with.
    """

    steps: int = 10
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    fisher_decay: float = 0.9
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulate) < 1 or self.learning_rate <= 0 or self.clip <= 0:
            raise OptionError(
                f"steps {self.steps}, batch {self.batch}, accumulate {self.accumulate}, learning rate "
                f"{self.learning_rate}, clip {self.clip}: expected numbers above 0"
            )
        if not 0 <= self.fisher_decay < 1 or self.proximal < 0 or self.weight_decay < 0:
            raise OptionError("fisher_decay lies from 0 to below 1, proximal and weight_decay are not negative")


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights and Fisher by name, the mean loss per labelled token over all steps, the examples at hand, and the share
    of labelled tokens that a token mask has left."""

    arrays: dict[str, Floats]
    fisher: dict[str, Floats]
    loss: float
    examples: int
    kept: float = 1.0


class LoraTrainer:
    """A causal language model of Transformers with a LoRA adapter that is trained in float32.

    model: in float32 or bfloat16, where it stays; its own weights are frozen. Arrays are named as in PEFT's files.
    factors: ``AB``, or ``B`` to train and exchange B only (FFA-LoRA, arXiv 2403.12313): half the weights. A is then
    what torch's random numbers give at this point, and a part of the identity: all clients have to seed them alike.
    """

    def __init__(
        self,
        model: Any,
        rank: int = 8,
        alpha: int = 16,
        targets: str | list[str] = LINEARS,
        factors: str = "AB",
    ) -> None:
        if factors not in ("AB", "B"):
            raise OptionError(f"factors to train are {factors!a}, expected 'AB' or 'B'")
        if (dtype := next(model.parameters()).dtype) not in (torch.float32, torch.bfloat16):
            raise OptionError(f"the model is in {dtype}, expected float32 or bfloat16. Load it with dtype='bfloat16'.")
        self.identity = identity(model)
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
        self.model = get_peft_model(model, lora)
        if factors == "B":
            fixed = {name: weight for name, weight in self.model.named_parameters() if ".lora_A." in name}
            for weight in fixed.values():
                weight.requires_grad_(False)
                weight.data = weight.data.float()
            self.identity = _digest(fixed, self.identity)
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self._trained:
            weight.data = weight.data.float()

    def arrays(self) -> dict[str, Floats]:
        """Copies of the adapter's weights, in PEFT's order."""
        return {name: weight.detach().float().cpu().numpy().copy() for name, weight in self._named()}

    def load(self, arrays: Mapping[str, Any]) -> None:
        """Put weights in. Raises OptionError unless names and shapes are the adapter's."""
        own = {name: tuple(weight.shape) for name, weight in self._named()}
        given = {name: tuple(array.shape) for name, array in arrays.items()}
        if own != given:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise OptionError(
                f"{len(wrong)} weights do not fit the adapter, the first is {wrong[0]!a}: found {given.get(wrong[0])}, "
                f"expected {own.get(wrong[0])}. Give client and server the same LoRA settings."
            )
        tensors = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
        set_peft_model_state_dict(self.model, tensors)

    def train(
        self,
        examples: Sequence[Example],
        settings: TrainSettings,
        seed: int | Sequence[int] = 0,
        tokens: TokenScores | None = None,
    ) -> Trained:
        """Train from the present weights. The same weights, examples, settings, seed and tokens give the same result.

        tokens: leaves out the loss of some, and learns from every step; loss and Fisher are then those of the rest.
        """
        if not examples:
            raise OptionError("there are no examples to train on. Leave this client out, or give it data.")
        self.model.train()
        start = [weight.detach().clone() for weight in self._trained]
        optimizer = torch.optim.AdamW(
            self._trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
        )
        fisher = [torch.zeros_like(weight) for weight in self._trained]
        total, counted, labelled, decay = 0.0, 0, 0, settings.fisher_decay
        draws = _draws(len(examples), settings.batch * settings.accumulate, np.random.default_rng(seed))
        for number in range(settings.steps):
            step = [examples[index] for index in next(draws)]
            optimizer.zero_grad()
            loss, count, whole = self._step(step, settings.batch, tokens)
            total, counted, labelled = total + loss, counted + count, labelled + whole
            weight = (1 - decay) / (1 - decay ** (number + 1))  # a mean at first, then a running one
            for squares, parameter in zip(fisher, self._trained, strict=True):
                if parameter.grad is not None:
                    squares.lerp_(parameter.grad.square(), weight)
            if settings.proximal:
                for parameter, before in zip(self._trained, start, strict=True):
                    if parameter.grad is not None:
                        parameter.grad += settings.proximal * (parameter.detach() - before)
            torch.nn.utils.clip_grad_norm_(self._trained, settings.clip, foreach=False)
            optimizer.step()
        by_weight = {id(parameter): values for parameter, values in zip(self._trained, fisher, strict=True)}
        found = {name: by_weight[id(weight)].cpu().numpy() for name, weight in self._named()}
        return Trained(self.arrays(), found, total / max(counted, 1), len(examples), counted / max(labelled, 1))

    def loss(self, examples: Sequence[Example], batch: int = 8) -> float:
        """Mean loss per labelled token."""
        self.model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(examples), batch):
                sum_of, count = self._sum(examples[start : start + batch])
                total, tokens = total + float(sum_of), tokens + count
        return total / max(tokens, 1)

    def save(self, path: str | Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json, as PEFT does."""
        self.model.save_pretrained(str(path))

    def _step(self, step: Sequence[Example], batch: int, tokens: TokenScores | None) -> tuple[float, int, int]:
        """(loss, its labelled tokens, all labelled tokens) of a step; gradients are those of the tokens in the mask."""
        whole = _labelled(step)
        if tokens is None:
            return *self._backward(step, batch), whole
        masked = [replace(row, labels=tokens.masked(row.labels, IGNORED)) for row in step]
        with embedding_gradients(self.model) as gradients:
            loss, count = self._backward(masked if _labelled(masked) else step, batch)
        scores = [found[row, : len(example.tokens)]
                  for found, start in zip(gradients(), range(0, len(step), batch), strict=True)
                  for row, example in enumerate(step[start : start + batch])]  # fmt: skip
        ids = np.concatenate([np.array(example.tokens) for example in step])
        labels = np.concatenate([np.array(example.labels[1:]) for example in step])
        tokens.after_step(ids, np.concatenate(scores) * np.float32(count) ** 2, labels[labels != IGNORED])
        return loss, count, whole

    def _backward(self, step: Sequence[Example], batch: int) -> tuple[float, int]:
        """Gradients of the mean loss per labelled token of a whole step, however it is cut into micro-batches."""
        tokens = _labelled(step)
        total = 0.0
        for start in range(0, len(step), batch):
            loss, _ = self._sum(step[start : start + batch])
            (loss / max(tokens, 1)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, tokens

    def _sum(self, examples: Sequence[Example]) -> tuple[torch.Tensor, int]:
        """(sum of the losses of all labelled tokens, their number)."""
        width = max(len(example.tokens) for example in examples)
        ids = torch.zeros((len(examples), width), dtype=torch.long)
        labels = torch.full((len(examples), width), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, example in enumerate(examples):
            ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
            mask[row, : len(example.tokens)] = 1
        device = self._trained[0].device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        aims = labels[:, 1:].to(device)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), aims.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return loss, int((aims != IGNORED).sum())

    def _named(self) -> list[tuple[str, Any]]:
        """Parameters by their names in PEFT's files."""
        weights: dict[str, Any] = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        own = {weight.data_ptr(): weight for weight in self._trained}
        return [(name, own[weight.data_ptr()]) for name, weight in weights.items() if weight.data_ptr() in own]


def identity(model: Any) -> bytes:
    """16 bytes that stand for a model's weights: names, types, shapes and values of its state."""
    return _digest(model.state_dict())


def _digest(tensors: Mapping[str, Any], before: bytes = b"") -> bytes:
    digest = hashlib.sha256(before)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()[:HASH_BYTES]


def _labelled(step: Sequence[Example]) -> int:
    return sum(sum(label != IGNORED for label in example.labels[1:]) for example in step)


def _draws(total: int, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Batches of indices, each example once before any comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(total).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
