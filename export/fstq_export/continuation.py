"""Labels for plain text: the dense model's own greedy continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Batch, Item, batches


def with_continuations(
    decoder: Decoder,
    items: Sequence[Item],
    tokens: int,
    max_positions: int,
    progress: Callable[[int], None] | None = None,
) -> list[Item]:
    """Items without an answer get ``tokens`` greedy ones (fewer at the end of a text); others stay as they are.

    Of longer prompts the last ``max_positions - tokens`` tokens are used; CalibrationDataError when there are none.
    """
    out = list(items)
    bare = [i for i, item in enumerate(items) if not item.answer]
    longest = max_positions - tokens
    if bare and longest < 1:
        raise CalibrationDataError(
            f"a continuation of {tokens} tokens leaves no room for a prompt in {max_positions} positions; "
            "calibrate this model with questions and answers instead"
        )
    prompts = [Item(items[i].prompt[-longest:], (0,)) for i in bare]
    stops = _stops(decoder)
    done = 0
    for indices, batch in batches(prompts):
        produced = _greedy(decoder, batch, tokens, stops)
        for index, answer in zip(indices, produced.tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(answer) if token in stops), len(answer))
            out[bare[index]] = Item(prompts[index].prompt, tuple(answer[:end]))
        done += len(indices)
        if progress:
            progress(done)
    return out


def _stops(decoder: Decoder) -> frozenset[int]:
    """The model's end-of-text tokens."""
    ends: Any = getattr(getattr(decoder.model, "generation_config", None), "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list | tuple) else () if ends is None else (ends,))


@torch.no_grad()
def _greedy(decoder: Decoder, batch: Batch, tokens: int, stops: frozenset[int]) -> torch.Tensor:
    """(B, at most tokens) ids that follow the prompts; meaningless after a stop.

    Not ``generate``: that applies what generation_config.json sets (a repetition penalty, beams), and a label that is
    not the argmax of the model's own logits would count as an error of the dense model.
    """
    ids, positions = batch.ids[:, : batch.prompt], batch.positions[:, : batch.prompt]
    mask = batch.prompt_valid.long()
    running = torch.ones(len(ids), dtype=torch.bool)
    found: list[torch.Tensor] = []
    cache = None
    while len(found) < tokens and running.any():
        output = decoder.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        positions, mask = positions[:, -1:] + 1, torch.cat([mask, torch.ones_like(ids)], 1)
        found.append(ids)
        running &= torch.tensor([int(token) not in stops for token in ids[:, 0]])
    return torch.cat(found, 1)
