"""The probe: a tiny head that predicts token sensitivity at inference, where there is no gradient.

Query-aware: token-level matches between the last Q positions and every token, from RMS-normed layer inputs and
embeddings; linear features, log window attention and lexical overlap; three 1-D convolutions, because words span
tokens; and a sum over ``span`` neighbours, because half a sentence is of little use. 54k parameters at width 64,
0.39 M at 896; the exported graph computes the same (fstq_export.passes.probe).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

QUERIES = 16  # so many last tokens are read as the question
EPSILON = 1e-6
NEGATIVE = -1e4


@dataclass(frozen=True, slots=True)
class ProbeInput:
    """Features of a left-padded batch of prompts at one prune layer.

    states: (B, S, 2D) RMS-normed layer input and embedding. side: (B, 2H + 3, S) log window attention (mean and max
    over the last Q queries) and lexical overlap. valid: (B, S) bool. asked: (B, S) bool, the question's tokens.
    """

    states: torch.Tensor
    side: torch.Tensor
    valid: torch.Tensor
    asked: torch.Tensor

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        embedded: torch.Tensor,
        attention: torch.Tensor,
        ids: torch.Tensor,
        valid: torch.Tensor,
        asked: torch.Tensor | None = None,
    ) -> ProbeInput:
        """hidden, embedded: (B, S, D); attention: (B, H, min(Q, S), S) of the last queries; ids, valid: (B, S).

        asked: (B, S), which of the last Q tokens belong to the question, all by default. Behind an earlier stage, which
        may have dropped some of it, what stands before it moves up.
        """
        width = hidden.shape[-1]
        states = torch.cat([functional.rms_norm(x.float(), (width,), eps=EPSILON) for x in (hidden, embedded)], -1)
        queries = attention.shape[2]
        if asked is None:
            asked = valid & (torch.arange(valid.shape[1]) >= valid.shape[1] - queries)
        rows = asked[:, -queries:].float()[:, None, :, None]
        seen = attention.float() * rows
        mean = seen.sum(2) / rows.sum(2)
        side = torch.cat(
            [(mean + EPSILON).log(), (seen.amax(2) + EPSILON).log(), lexical(ids, valid, asked, queries)], 1
        )
        return cls(states, side, valid, asked)

    def row(self, index: int) -> ProbeInput:
        """One item without its padding, in half precision for keeping."""
        valid = self.valid[index]
        states, side = self.states[index, valid].half(), self.side[index][:, valid].half()
        return ProbeInput(states, side, valid[valid], self.asked[index, valid])

    @classmethod
    def pad(cls, rows: list[ProbeInput]) -> ProbeInput:
        """Rows (from :meth:`row`) as one left-padded batch."""
        size = max(len(r.valid) for r in rows)
        gap = [size - len(r.valid) for r in rows]
        return cls(
            torch.stack([functional.pad(r.states.float(), (0, 0, g, 0)) for r, g in zip(rows, gap, strict=True)]),
            torch.stack([functional.pad(r.side.float(), (g, 0)) for r, g in zip(rows, gap, strict=True)]),
            torch.stack([functional.pad(r.valid, (g, 0)) for r, g in zip(rows, gap, strict=True)]),
            torch.stack([functional.pad(r.asked, (g, 0)) for r, g in zip(rows, gap, strict=True)]),
        )


def lexical(ids: torch.Tensor, valid: torch.Tensor, asked: torch.Tensor, queries: int) -> torch.Tensor:
    """(B, 3, S): whether the question holds this token (over its count in the prompt), this bigram, this trigram.

    asked: its tokens, among the last ``queries``; they match nothing themselves.
    """
    real, outside = valid.float(), (valid & ~asked).float()
    uni = (ids[:, -queries:, None] == ids[:, None, :]).float() * asked[:, -queries:, None] * outside[:, None, :]
    bi = uni * functional.pad(uni, (1, 0, 1, 0))[:, :-1, :-1]
    tri = bi * functional.pad(bi, (1, 0, 1, 0))[:, :-1, :-1]
    count = ((ids[:, :, None] == ids[:, None, :]).float() * real[:, None, :]).sum(2).clamp(min=1)
    return torch.stack([uni.amax(1) / count, bi.amax(1), tri.amax(1)], 1)


class Probe(nn.Module):
    """Scores (B, S) of a :class:`ProbeInput`; higher matters more. ``heads`` matches of width ``rank``.

    queries: so many last tokens are read as the question. window: so many last ones stay anyway; default: the same.
    span: odd; where it is above 1, a token's score is the sum over that many tokens around it of what their scores are
    above the prompt's mean; the window's and those beyond an end count as average. Whole phrases stay or go. It is set
    after distillation: a probe that is trained through the sum learns to undo it.
    """

    span: torch.Tensor

    def __init__(
        self,
        width: int,
        attention_heads: int,
        queries: int = QUERIES,
        window: int | None = None,
        rank: int = 24,
        heads: int = 4,
        linear: int = 8,
        span: int = 1,
    ) -> None:
        super().__init__()
        self.queries, self.window = queries, queries if window is None else window
        self.heads, self.rank = heads, rank
        features = 2 * heads + linear + 2 * attention_heads + 3
        self.query = nn.Linear(2 * width, heads * rank)
        self.key = nn.Linear(2 * width, heads * rank)
        self.linear = nn.Linear(2 * width, linear)
        self.conv1 = nn.Conv1d(features, 32, 9, padding=4)
        self.conv2 = nn.Conv1d(32, 32, 17, padding=8)
        self.conv3 = nn.Conv1d(32, 1, 9, padding=4)
        self.skip = nn.Conv1d(features, 1, 1)
        for parameter in self.skip.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("span", torch.ones(1, 1, span))

    @classmethod
    def untrained(cls, width: int, attention_heads: int, queries: int = QUERIES, window: int | None = None) -> Probe:
        """Without calibration data: scores are the mean log window attention (SnapKV's signal), training-free."""
        probe = cls(width, attention_heads, queries, window)
        with torch.no_grad():
            for parameter in probe.conv3.parameters():
                parameter.zero_()
            start = probe.skip.weight.shape[1] - 3 - 2 * attention_heads
            probe.skip.weight[0, start : start + attention_heads] = 1 / attention_heads
        return probe

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[np.float32]], queries: int = QUERIES, window: int | None = None
    ) -> Probe:
        """The probe that :meth:`arrays` was taken from."""
        heads, rank, width = arrays["query.weight"].shape
        linear = arrays["linear.weight"].shape[0]
        attention_heads = (arrays["conv1.weight"].shape[1] - 2 * heads - linear - 3) // 2
        span = arrays["span"].shape[2]
        probe = cls(width // 2, attention_heads, queries, window, rank, heads, linear, span)
        flat = {
            name: torch.from_numpy(np.ascontiguousarray(a)).reshape(probe.state_dict()[name].shape)
            for name, a in arrays.items()
        }
        probe.load_state_dict(flat)
        return probe

    def forward(self, x: ProbeInput) -> torch.Tensor:
        mask = x.valid[:, None].float()
        rows = x.asked[:, -self.queries :].float()[:, None, :, None]
        q = self.query(x.states[:, -self.queries :]).unflatten(-1, (self.heads, self.rank)).transpose(1, 2)
        k = self.key(x.states).unflatten(-1, (self.heads, self.rank)).transpose(1, 2)
        match = q @ k.transpose(-1, -2) * self.rank**-0.5 + (rows - 1) * -NEGATIVE
        linear = self.linear(x.states).transpose(1, 2)
        features = torch.cat([match.amax(2), match.logsumexp(2), linear, x.side], 1) * mask
        first = functional.gelu(self.conv1(features)) * mask
        second = (first + functional.gelu(self.conv2(first))) * mask
        scores: torch.Tensor = self.conv3(second) + self.skip(features)
        size = self.span_size
        if size > 1:
            free = mask * (torch.arange(mask.shape[2]) < mask.shape[2] - self.window)
            mean = (scores * free).sum(2, keepdim=True) / free.sum(2, keepdim=True).clamp(min=1)
            scores = functional.conv1d((scores - mean) * free, self.span, padding=size // 2)
        return scores[:, 0]

    @property
    def span_size(self) -> int:
        """Tokens that a score is summed over."""
        return int(self.span.shape[2])

    def with_span(self, span: int) -> Probe:
        """The same probe with scores summed over ``span`` tokens."""
        return Probe.from_arrays(self.arrays() | {"span": np.ones((1, 1, span), np.float32)}, self.queries, self.window)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """A copy of the weights by name, for the graph pass; query and key as (heads, rank, 2D) and (heads, rank)."""
        found = {name: value.detach().float().numpy().copy() for name, value in self.state_dict().items()}
        for name in ("query", "key"):
            found[f"{name}.weight"] = found[f"{name}.weight"].reshape(self.heads, self.rank, -1)
            found[f"{name}.bias"] = found[f"{name}.bias"].reshape(self.heads, self.rank)
        return found
