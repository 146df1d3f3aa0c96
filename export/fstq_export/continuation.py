"""Labels for plain text: the dense model's own greedy continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item, batches


def with_continuations(
    decoder: Decoder,
    items: Sequence[Item],
    tokens: int,
    max_positions: int,
    progress: Callable[[int], None] | None = None,
) -> list[Item]:
    """Items without an answer get ``tokens`` greedy ones (fewer at the end of a text); others stay as they are."""
    out = list(items)
    bare = [i for i, item in enumerate(items) if not item.answer]
    prompts = [Item(items[i].prompt[-(max_positions - tokens) :], (0,)) for i in bare]
    done = 0
    for indices, batch in batches(prompts):
        ids, mask = batch.ids[:, : batch.prompt], batch.valid[:, : batch.prompt].long()
        with torch.no_grad():
            produced = decoder.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )  # type: ignore[operator]
        ends = decoder.model.generation_config.eos_token_id  # type: ignore[union-attr]
        stops = set(ends) if isinstance(ends, list) else {ends}
        for row, index in enumerate(indices):
            answer = produced[row, batch.prompt :].tolist()
            cut = next((n + 1 for n, token in enumerate(answer) if token in stops), len(answer))
            out[bare[index]] = Item(prompts[index].prompt, tuple(answer[:cut]))
        done += len(indices)
        if progress:
            progress(done)
    return out
