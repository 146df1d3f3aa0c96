"""Calibration items as token ids, and left-padded batches of them. Knows no file format and no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its label, both as token ids; the label is what the dense model should go on with."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Cut:
    """What an earlier pruning stage left of some items: from decoder layer ``layer`` on.

    kept: per item, ascending indices into its prompt.
    """

    layer: int
    kept: Sequence[NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded on the left and answers padded on the right, so that prompts and answers meet in one column.

    ids, positions: (B, S) int64; positions are 0 where padded. valid: (B, S) bool. prompt: number of columns before
    the answers; the last prompt token of every row is in column ``prompt - 1``. answer_mask: (B, S - prompt) bool.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    prompt: int
    answer_mask: torch.Tensor

    @property
    def prompt_valid(self) -> torch.Tensor:
        """(B, prompt) bool: which prompt columns hold tokens."""
        return self.valid[:, : self.prompt]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [int(count) for count in self.prompt_valid.sum(1)]

    @property
    def labels(self) -> torch.Tensor:
        """(B, S - prompt) int64 answer ids; meaningless where ``answer_mask`` is false."""
        return self.ids[:, self.prompt :]


def collate(items: Sequence[Item]) -> Batch:
    """One batch of the items, in their order."""
    prompt = max(len(item.prompt) for item in items)
    answer = max(len(item.answer) for item in items)
    ids = torch.zeros(len(items), prompt + answer, dtype=torch.long)
    valid = torch.zeros(len(items), prompt + answer, dtype=torch.bool)
    for row, item in enumerate(items):
        ids[row, prompt - len(item.prompt) : prompt] = torch.tensor(item.prompt)
        ids[row, prompt : prompt + len(item.answer)] = torch.tensor(item.answer)
        valid[row, prompt - len(item.prompt) : prompt + len(item.answer)] = True
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    return Batch(ids, positions, valid, prompt, valid[:, prompt:])


def batches(items: Sequence[Item], tokens: int = 4096, at_most: int = 16) -> Iterator[tuple[list[int], Batch]]:
    """(indices, batch) over all items, similar lengths together: up to ``at_most`` rows and ``tokens`` padded tokens.

    An item of more than ``tokens`` tokens makes a batch of its own.
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    chunk: list[int] = []
    prompt = answer = 0
    for i in order:
        prompt, answer = max(prompt, len(items[i].prompt)), max(answer, len(items[i].answer))
        if chunk and (len(chunk) == at_most or (len(chunk) + 1) * (prompt + answer) > tokens):
            yield chunk, collate([items[j] for j in chunk])
            chunk, prompt, answer = [], len(items[i].prompt), len(items[i].answer)
        chunk.append(i)
    if chunk:
        yield chunk, collate([items[j] for j in chunk])
