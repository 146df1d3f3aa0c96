"""A small Llama with merged LoRA on flat vectors: what bench/federated.py trains. Equal to Transformers' own (checked).

Thousands of clients' steps on one core: weights are merged with their adapter once a step (W + B A alpha / r), the
adapter is one vector, and AdamW works on that vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fstq_infer.federated.tensors import TensorManifest

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
        """Tensors that are trained: ``AB`` all, ``B`` those of B, ``B-vod`` without queries and keys."""
        kept = [name for name, _ in self.manifest.tensors]
        if name != "AB":
            kept = [tensor for tensor in kept if tensor.endswith("B")]
        if name == "B-vod":
            kept = [tensor for tensor in kept if ".q_proj." not in tensor and ".k_proj." not in tensor]
        return kept

    def start(self, seed: int) -> torch.Tensor:
        """A as PEFT draws it, B zero."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for name, shape in self.manifest.tensors:
            drawn = (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
            parts.append((drawn if name.endswith("A") else torch.zeros(shape)).flatten())
        return torch.cat(parts)

    def train(
        self, start: torch.Tensor, rows: torch.Tensor, work: Work, seed: Any, mask: torch.Tensor | None
    ) -> tuple[Any, Any]:
        """(delta, mean squared gradients) of one client. rows: (n, length) tokens. mask: 1 for weights that train."""
        weights = start.clone().requires_grad_()
        first, second, fisher = (torch.zeros(len(start)) for _ in range(3))
        rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
        for step in range(1, work.steps + 1):
            while len(order) < work.batch:
                order = np.concatenate([order, rng.permutation(len(rows))])
            batch, order = order[: work.batch], order[work.batch :]
            (gradient,) = torch.autograd.grad(self.loss(weights, rows[batch]), weights)
            if mask is not None:
                gradient = gradient * mask
            fisher += gradient.square() / work.steps
            gradient = gradient / max(1.0, float(gradient.norm()))
            first.lerp_(gradient, 1 - work.decay[0])
            second.lerp_(gradient.square(), 1 - work.decay[1])
            moved = first / (1 - work.decay[0] ** step) / ((second / (1 - work.decay[1] ** step)).sqrt() + 1e-8)
            with torch.no_grad():
                weights -= work.rate * moved
        return (weights.detach() - start).numpy(), fisher.numpy()

    def evaluate(self, weights: torch.Tensor, rows: torch.Tensor) -> float:
        """Mean loss per token."""
        with torch.no_grad():
            total = sum(float(self.loss(weights, part, "sum")) for part in rows.split(32))
        return total / (rows.shape[0] * (rows.shape[1] - 1))

    def loss(self, weights: torch.Tensor, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy of all tokens but the first."""
        return functional.cross_entropy(
            self.logits(rows[:, :-1], self._merged(weights)), rows[:, 1:].reshape(-1), reduction=reduction
        )

    def logits(self, ids: torch.Tensor, layers: list[list[torch.Tensor]]) -> torch.Tensor:
        """(batch x length, vocabulary)."""
        batch, length = ids.shape
        share, heads, groups, width = self.heads // self.groups, self.heads, self.groups, self.width
        mask = torch.full((length, length), -1e9).triu(1).repeat(share, 1)
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding[ids].flatten(0, 1)
        for (q, k, v, o, gate, up, down), (before, after) in zip(layers, self.norms, strict=True):
            hidden = functional.rms_norm(x, x.shape[-1:], before, self.eps)
            joined = hidden @ torch.cat([q * width**-0.5, k, v]).T
            joined = joined.view(batch, length, heads + 2 * groups, width).transpose(1, 2)
            turned, values = joined[:, : heads + groups], joined[:, heads + groups :]
            turned = turned * cos + turned.roll(width // 2, -1) * sin
            asked = turned[:, :heads].reshape(batch * groups, share * length, width)
            keys = turned[:, heads:].reshape(batch * groups, length, width)
            chances = torch.baddbmm(mask, asked, keys.transpose(1, 2)).softmax(-1)
            mixed = torch.bmm(chances, values.reshape(batch * groups, length, width))
            mixed = mixed.view(batch, groups, share, length, width).permute(0, 3, 1, 2, 4)
            x = torch.addmm(x, mixed.reshape(batch * length, heads * width), o.T)
            hidden = functional.rms_norm(x, x.shape[-1:], after, self.eps)
            first, second = (hidden @ torch.cat([gate, up]).T).chunk(2, -1)
            x = torch.addmm(x, functional.silu(first) * second, down.T)
        return functional.rms_norm(x, x.shape[-1:], None, self.eps) @ self.head.T

    def _merged(self, weights: torch.Tensor) -> list[list[torch.Tensor]]:
        parts = iter(weights.split(self.sizes))
        merged: list[list[torch.Tensor]] = []
        for layer in self.layers:
            merged.append([])
            for weight in layer:
                a, b = next(parts).view(self.rank, -1), next(parts).view(-1, self.rank)
                merged[-1].append(torch.addmm(weight, b, a, alpha=self.scale))
        return merged

    def _check(self, model: Any) -> None:
        ids = torch.randint(3, len(self.embedding), (2, 48), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            error = float((self.logits(ids, self.layers) - model(ids).logits.flatten(0, 1)).abs().max())
        if error > TOLERANCE:
            raise SystemExit(
                f"logits differ from those of Transformers by {error:.2g}: this benchmark reads Llama only"
            )
