"""The reference for pruning in torch: dropped tokens are masked as keys in every layer from the prune layer on.

For the tokens that stay this computes what removing the others computes; the exported graph really removes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fstq_infer.fisher.gates import outcome, run
from fstq_infer.fisher.hooks import Decoder, watch
from fstq_infer.fisher.items import Batch, Item, batches

NEVER = -1e9


def drop_bias(kept: Sequence[NDArray[np.int64]], batch: Batch) -> torch.Tensor:
    """(B, 1, S, S) bias that hides all prompt tokens but the kept ones from other queries.

    kept: per row the indices that stay, counted in the row's own prompt, without its padding.
    A dropped token still sees itself: its output is read by nobody, but has to stay finite.
    """
    total, prompt = batch.ids.shape[1], batch.prompt
    bias = torch.zeros(len(kept), total)
    for row, columns in enumerate(kept):
        start = prompt - int(batch.prompt_valid[row].sum())
        bias[row, start:prompt] = NEVER
        bias[row, torch.from_numpy(columns) + start] = 0
    return bias[:, None, None, :] * (1 - torch.eye(total))


def pruned_outcome(
    decoder: Decoder, items: Sequence[Item], layer: int, choose: Callable[[Sequence[int]], Sequence[NDArray[np.int64]]]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(exact match (N,), nll (N,)) of all items; ``choose(indices)`` gives the kept prompt indices of each."""
    exact, nll = np.zeros(len(items), bool), np.zeros(len(items))
    for indices, batch in batches(items):
        bias = drop_bias(choose(indices), batch)
        with torch.no_grad(), watch(decoder) as seen:
            seen.bias.update(dict.fromkeys(range(layer, len(decoder.layers)), bias))
            hit, loss = outcome(run(decoder, batch), batch)
        exact[indices], nll[indices] = hit.numpy(), loss.double().numpy()
    return exact, nll
