"""A small Llama with merged LoRA on flat vectors: what bench/federated.py trains. Equal to Transformers' own (checked).

Thousands of clients' steps on one core: weights are merged with their adapter once a step (W + B A alpha / r), the
adapter is one vector, AdamW works on that vector, and all clients of a round take their steps together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fstq_infer.federated.tensors import TensorManifest
from fstq_infer.federated.tokens import TokenScores

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENDING = {"q_proj", "k_proj"}
TOLERANCE = 1e-3  # of logits, against Transformers


@dataclass(frozen=True)
class Work:
    """One client's local training: AdamW with gradients clipped to norm 1."""

    steps: int
    batch: int
    rate: float
    decay: tuple[float, float] = (0.9, 0.99)


class LoraLlama:
    """The model, and the layout of its adapter: for each linear layer A (rank, in), then B (out, rank)."""

    def __init__(self, path: Path, rank: int = 8, scale: float = 2.0) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        config = model.config
        self.rank, self.scale, self.eps = rank, scale, config.rms_norm_eps
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.embedding = model.model.embed_tokens.weight.detach()
        self.head = model.lm_head.weight.detach() * model.model.norm.weight.detach()
        self.layers, self.norms = [], []
        for layer in model.model.layers:
            parts = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
            self.layers.append([parts[kind].weight.detach() for kind in KINDS])
            self.norms.append((layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()))
        powers = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.width, 2).float() / self.width)
        angles = torch.arange(config.max_position_embeddings).float()[:, None] * powers
        self.cos = torch.cat([angles.cos(), angles.cos()], -1)
        self.sin = torch.cat([-angles.sin(), angles.sin()], -1)
        shapes = []
        for number, layer in enumerate(self.layers):
            for kind, weight in zip(KINDS, layer, strict=True):
                shapes.append((f"layers.{number}.{kind}.lora_A", (rank, weight.shape[1])))
                shapes.append((f"layers.{number}.{kind}.lora_B", (weight.shape[0], rank)))
        self.manifest = TensorManifest(tuple(shapes))
        self.sizes = self.manifest.sizes.tolist()
        self.names = np.repeat([name for name, _ in shapes], self.sizes)
        self._check(model)

    def parts(self, name: str) -> list[str]:
        """Tensors that are trained: ``AB`` all, ``B`` those of B; ``AB-vod``, ``B-vod`` without queries and keys."""
        factors, _, places = name.partition("-")
        kept = [tensor for tensor, _ in self.manifest.tensors if tensor[-1] in factors]
        return [tensor for tensor in kept if not places or not ATTENDING & set(tensor.split("."))]

    def start(self, seed: int) -> torch.Tensor:
        """A as PEFT draws it, B zero."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for name, shape in self.manifest.tensors:
            drawn = (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
            parts.append((drawn if name.endswith("A") else torch.zeros(shape)).flatten())
        return torch.cat(parts)

    def train(
        self,
        start: torch.Tensor,
        rows: Sequence[torch.Tensor],
        work: Work,
        seeds: Sequence[Any],
        mask: torch.Tensor,
        tokens: Sequence[TokenScores] | None = None,
    ) -> tuple[Any, Any]:
        """((C, N) deltas, (C, N) mean squared gradients) of C clients that start alike, all at once.

        rows: (n, length) tokens of each. seeds: of their order. mask: (N,) 1 for weights that train. tokens: running
        scores that say whose loss counts; they are moved on.
        """
        if not rows:
            return np.zeros((0, len(start)), np.float32), np.zeros((0, len(start)), np.float32)
        weights = start.repeat(len(rows), 1).requires_grad_()
        first, second, fisher = (torch.zeros_like(weights, requires_grad=False) for _ in range(3))
        orders = [_order(len(mine), work, seed) for mine, seed in zip(rows, seeds, strict=True)]
        for step in range(1, work.steps + 1):
            batch = torch.stack([mine[order[step - 1]] for mine, order in zip(rows, orders, strict=True)])
            gradient = self._gradient(weights, batch, tokens) * mask
            fisher += gradient.square() / work.steps
            gradient = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1.0)
            first.lerp_(gradient, 1 - work.decay[0])
            second.lerp_(gradient.square(), 1 - work.decay[1])
            moved = first / (1 - work.decay[0] ** step) / ((second / (1 - work.decay[1] ** step)).sqrt() + 1e-8)
            with torch.no_grad():
                weights -= work.rate * moved
        return (weights.detach() - start).numpy(), fisher.numpy()

    def _gradient(
        self, weights: torch.Tensor, batch: torch.Tensor, tokens: Sequence[TokenScores] | None
    ) -> torch.Tensor:
        """(C, N) of each client's mean loss. batch: (C, rows, length)."""
        ids, labels = batch[:, :, :-1].flatten(1), batch[:, :, 1:].flatten(1)
        embedded = self.embedding[ids]
        counted = torch.ones(labels.shape)
        if tokens is not None:
            counted = torch.from_numpy(
                np.stack([each.kept[mine] for each, mine in zip(tokens, labels.numpy(), strict=True)])
            ).float()
            embedded.requires_grad_()
        losses = self._losses(weights, embedded, labels, batch.shape[1])
        means = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
        if tokens is None:
            return torch.autograd.grad(means.sum(), weights)[0]
        gradient, felt = torch.autograd.grad(means.sum(), (weights, embedded))
        scores = (felt * counted.sum(1)[:, None, None]).square().sum(-1).numpy()
        for each, seen, score, label in zip(tokens, ids.numpy(), scores, labels.numpy(), strict=True):
            each.after_step(seen, score, label)
        return gradient

    def evaluate(self, weights: torch.Tensor, rows: torch.Tensor) -> float:
        """Mean loss per token."""
        total = 0.0
        with torch.no_grad():
            for part in rows.split(32):
                ids, labels = part[:, :-1].reshape(1, -1), part[:, 1:].reshape(1, -1)
                total += float(self._losses(weights[None], self.embedding[ids], labels, len(part)).sum())
        return total / (rows.shape[0] * (rows.shape[1] - 1))

    def _losses(self, weights: torch.Tensor, embedded: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:
        """(C, rows x length) cross-entropy of all tokens but the first."""
        logits = self.logits(embedded, self._merged(weights), rows)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def logits(self, x: torch.Tensor, layers: list[list[torch.Tensor]], rows: int) -> torch.Tensor:
        """(C, rows x length, vocabulary). x: (C, rows x length, width) embeddings. layers: (C, out, in) each."""
        clients, length = len(x), x.shape[1] // rows
        batch = clients * rows
        share, heads, groups, width = self.heads // self.groups, self.heads, self.groups, self.width
        mask = torch.full((length, length), -1e9).triu(1).repeat(share, 1)
        cos, sin = self.cos[:length], self.sin[:length]
        for (q, k, v, o, gate, up, down), (before, after) in zip(layers, self.norms, strict=True):
            hidden = functional.rms_norm(x, x.shape[-1:], before, self.eps)
            joined = hidden @ torch.cat([q * width**-0.5, k, v], 1).mT
            joined = joined.view(batch, length, heads + 2 * groups, width).transpose(1, 2)
            turned, values = joined[:, : heads + groups], joined[:, heads + groups :]
            turned = turned * cos + turned.roll(width // 2, -1) * sin
            asked = turned[:, :heads].reshape(batch * groups, share * length, width)
            keys = turned[:, heads:].reshape(batch * groups, length, width)
            chances = torch.baddbmm(mask, asked, keys.mT).softmax(-1)
            mixed = torch.bmm(chances, values.reshape(batch * groups, length, width))
            mixed = mixed.view(batch, groups, share, length, width).permute(0, 3, 1, 2, 4)
            x = torch.baddbmm(x, mixed.reshape(clients, rows * length, heads * width), o.mT)
            hidden = functional.rms_norm(x, x.shape[-1:], after, self.eps)
            first, second = (hidden @ torch.cat([gate, up], 1).mT).chunk(2, -1)
            x = torch.baddbmm(x, functional.silu(first) * second, down.mT)
        return functional.rms_norm(x, x.shape[-1:], None, self.eps) @ self.head.T

    def _merged(self, weights: torch.Tensor) -> list[list[torch.Tensor]]:
        """(C, out, in) of each linear layer. weights: (C, N)."""
        parts = iter(weights.split(self.sizes, 1))
        merged: list[list[torch.Tensor]] = []
        for layer in self.layers:
            merged.append([])
            for weight in layer:
                a = next(parts).reshape(len(weights), self.rank, -1)
                b = next(parts).reshape(len(weights), -1, self.rank)
                merged[-1].append(torch.baddbmm(weight, b, a, alpha=self.scale))
        return merged

    def _check(self, model: Any) -> None:
        size = (2, min(48, len(self.cos)))
        ids = torch.randint(3, len(self.embedding), size, generator=torch.Generator().manual_seed(0))
        layers = [[weight[None] for weight in layer] for layer in self.layers]
        with torch.no_grad():
            mine = self.logits(self.embedding[ids].view(1, -1, self.embedding.shape[1]), layers, 2)
            error = float((mine[0] - model(ids).logits.flatten(0, 1)).abs().max())
        if error > TOLERANCE:
            raise SystemExit(
                f"logits differ from those of Transformers by {error:.2g}: this benchmark reads Llama only"
            )


def _order(count: int, work: Work, seed: Any) -> Any:
    """(steps, batch) row numbers: one permutation after another."""
    rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
    while len(order) < work.steps * work.batch:
        order = np.concatenate([order, rng.permutation(count)])
    return order[: work.steps * work.batch].reshape(work.steps, work.batch)
