"""The reference for pruning in torch: dropped tokens are masked as keys in every layer from the prune layer on.

For the tokens that stay this computes what removing the others computes; the exported graph really removes them.
Calibration measures with it, verification compares the graph with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fstq_infer.fisher.gates import Present, features, outcome, run
from fstq_infer.fisher.hooks import Decoder, Seen, drop_bias, watch
from fstq_infer.fisher.items import Batch, Cut, Item, batches
from fstq_infer.fisher.probe import Probe

Int64 = NDArray[np.int64]
# (stage, row, tokens still there, their scores) -> those that stay. Tokens are ascending indices into the row's prompt.
# At a stage without a probe the scores are those of the stage before; where no stage had a probe yet, there are none.
Choose = Callable[[int, int, Int64, NDArray[np.float32]], Int64]


@contextmanager
def pruning(
    decoder: Decoder, batch: Batch, layers: Sequence[int], choose: Choose, probes: Sequence[Probe | None]
) -> Iterator[list[list[Int64]]]:
    """Prunes the batch before each of ``layers``, in a forward pass within; yields the tokens of each row by stage.

    The first entry holds all tokens, entry n what stays after stage n, once the pass is over.
    """
    kept: list[list[Int64]] = [[np.arange(n) for n in batch.lengths]]
    scores = [np.zeros(0, np.float32)] * len(kept[0])
    scored = [layer for layer, probe in zip(layers, probes, strict=True) if probe is not None]

    def stage(number: int) -> Callable[[Seen], None]:
        def apply(seen: Seen) -> None:
            layer, probe, there = layers[number], probes[number], kept[number]
            if probe is not None:
                present = Present.of(batch, there)
                found = probe(features(seen, layer, batch, present, probe.queries)).float().numpy()
                scores[:] = [row[valid] for row, valid in zip(found, present.valid.numpy(), strict=True)]
            stay = [choose(number, row, *known) for row, known in enumerate(zip(there, scores, strict=True))]
            kept.append(stay)
            if len(scores[0]):
                parts = zip(scores, there, stay, strict=True)
                scores[:] = [own[np.isin(tokens, left)] for own, tokens, left in parts]
            seen.bias.update(dict.fromkeys(range(layer, len(decoder.layers)), drop_bias(kept[-1], batch)))

        return apply

    before = {layer: stage(number) for number, layer in enumerate(layers)}
    looks = tuple(layer - 1 for layer in scored)
    with torch.no_grad(), watch(decoder, hidden=(0, *scored) if scored else (), attention=looks, before=before):
        yield kept


@dataclass(frozen=True, slots=True)
class Pruned:
    """Pruned answers of N items: exact match (N,), mean negative log-likelihood (N,), and what each stage left."""

    exact: NDArray[np.bool_]
    nll: NDArray[np.float64]
    cuts: tuple[Cut, ...]


def pruned_outcome(
    decoder: Decoder,
    items: Sequence[Item],
    layers: Sequence[int],
    choose: Choose,
    probes: Sequence[Probe | None] | None = None,
) -> Pruned:
    """All items, pruned before each of ``layers``; for ``choose`` a row is an index into ``items``."""
    exact, nll = np.zeros(len(items), bool), np.zeros(len(items))
    kept_by_stage = [[np.zeros(0, np.int64)] * len(items) for _ in layers]
    for indices, batch in batches(items):

        def row_of(
            stage: int, row: int, tokens: Int64, scores: NDArray[np.float32], at: Sequence[int] = indices
        ) -> Int64:
            return choose(stage, at[row], tokens, scores)

        with pruning(decoder, batch, layers, row_of, probes or [None] * len(layers)) as kept:
            hit, loss = outcome(run(decoder, batch), batch)
        exact[indices], nll[indices] = hit.numpy(), loss.double().numpy()
        for found, left in zip(kept_by_stage, kept[1:], strict=True):
            for index, tokens in zip(indices, left, strict=True):
                found[index] = tokens
    return Pruned(exact, nll, tuple(map(Cut, layers, kept_by_stage)))
