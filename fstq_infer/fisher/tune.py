"""Tuning the probe through sampled gates in the frozen model, towards what the dense model says.

A gate is a sigmoid around a threshold that lets just the budget through. On its own such a gate leaks: a probe learns
to leave every door ajar, which no selection can do. So each score is first disturbed by Gumbel noise, as if the tokens
were drawn one after another (Plackett-Luce; Kool et al., arXiv 1903.06059): what stays ajar is now shut, now open, and
the order of the scores is what counts. Tokens whose gates are all but shut leave the pass, which makes it cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fstq_infer.fisher.gates import Observation, run
from fstq_infer.fisher.hooks import Decoder, key_bias, watch
from fstq_infer.fisher.items import Batch, Cut, Item, batches, collate
from fstq_infer.fisher.prefix import Prefix
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.prune import pruning
from fstq_infer.fisher.select import keep_count

KEEPS = (0.5, 0.25, 0.125, 0.125)  # keep ratios seen while tuning
RATE, WARM = 1e-3, 20  # of AdamW, and steps over which it rises; it falls along a cosine
ROWS, TOKENS = 8, 2560  # of a step, at most; of longer items fewer rows
WARMEST, COLDEST = 0.5, 0.25  # temperature of the gates, at first and at last
SHUT = 0.02  # a gate below lets nothing through
HALVINGS = 30

Progress = Callable[[int], None]


def soft_top(scores: torch.Tensor, free: torch.Tensor, budget: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, S) log gates of free tokens that sum up to ``budget`` (B,) gates in each row; 0 for all others.

    Where one score rises the threshold does too, so that gates compete. scores: (B, S); free: (B, S) bool.
    """
    with torch.no_grad():
        low = scores.masked_fill(~free, math.inf).amin(1) - 20 * temperature
        high = scores.masked_fill(~free, -math.inf).amax(1) + 20 * temperature
        low, high = (torch.where(free.any(1), end, torch.zeros(())) for end in (low, high))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            mass = (((scores - middle[:, None]) / temperature).sigmoid() * free).sum(1)
            low, high = torch.where(mass > budget, middle, low), torch.where(mass > budget, high, middle)
        threshold = (low + high) / 2
        gate = ((scores - threshold[:, None]) / temperature).sigmoid()
        share = gate * (1 - gate) * free
        share /= share.sum(1, keepdim=True).clamp(min=1e-9)
    moving = threshold + (share * (scores - scores.detach())).sum(1)
    gates = functional.logsigmoid((scores - moving[:, None]) / temperature)
    return torch.where(free, gates, torch.zeros(()))


@dataclass(slots=True)
class Tuner:
    """What a step of :func:`tune` needs. cuts: what earlier stages left of the items.

    inputs of observations are what the probe reads: nothing before ``layer`` depends on it, so those layers run once.
    """

    probe: Probe
    decoder: Decoder
    layer: int
    items: Sequence[Item]
    observations: Sequence[Observation]
    sink: int
    cuts: Sequence[Cut] = ()
    prefix: Prefix = field(init=False)

    def __post_init__(self) -> None:
        self.prefix = Prefix(self.decoder, self.cuts[0].layer if self.cuts else self.layer)

    def loss(
        self, chosen: Sequence[int], keeps: Sequence[float], temperature: float, noise: torch.Generator | None = None
    ) -> torch.Tensor:
        """Cross-entropy to the dense model's answers, as observed, of items ``chosen``; mean over them.

        keeps: for each, the share that stays of the tokens that earlier stages left. noise: None for none.
        """
        seen = [self.observations[i] for i in chosen]
        x = ProbeInput.pad([o.inputs[self.layer] for o in seen])
        scores = self.probe(x)
        if noise is not None:
            scores = scores - torch.empty_like(scores).exponential_(generator=noise).log()
        free, budget = self._free(x.valid, keeps)
        gates = soft_top(scores, free, budget, temperature)
        batch = collate([self.items[i] for i in chosen])
        logits = self._gated(batch, chosen, x.valid, gates)
        loss = torch.zeros(())
        for row, dense in enumerate(seen):
            logp = logits[row, : len(dense.likely)].log_softmax(-1).gather(1, dense.likely)
            loss = loss - (dense.weight * logp).sum(-1).mean() / len(seen)
        return loss

    def _free(self, valid: torch.Tensor, keeps: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, S) tokens that are not forced to stay, (B,) how many of them stay)."""
        column, counts = torch.arange(valid.shape[1]), valid.sum(1, keepdim=True)
        start = valid.shape[1] - counts
        forced = (column - start < self.sink) | (column >= valid.shape[1] - self.probe.window)
        stay = [
            keep_count(int(n), keep, self.sink, self.probe.window) for n, keep in zip(counts[:, 0], keeps, strict=True)
        ]
        return valid & ~forced, torch.tensor(stay) - (valid & forced).sum(1)

    def _gated(self, batch: Batch, chosen: Sequence[int], valid: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Logits of the answers with keys gated at and after the layer. valid, gates: (B, S) of the tokens there."""
        mine = [row[known] for row, known in zip(gates, valid, strict=True)]
        ajar = [row.detach() > math.log(SHUT) for row in mine]
        most = max(int(row.sum()) for row in ajar)
        bias = [functional.pad(row[some], (most - int(some.sum()), 0)) for row, some in zip(mine, ajar, strict=True)]

        def choose(stage: int, row: int, tokens: NDArray[np.int64], _scores: NDArray[np.float32]) -> NDArray[np.int64]:
            return self.cuts[stage].kept[chosen[row]] if stage < len(self.cuts) else tokens[ajar[row].numpy()]

        layers = [*(cut.layer for cut in self.cuts), self.layer]
        with (
            self.prefix.ahead(batch),
            pruning(self.decoder, batch, layers, choose, [None] * len(layers)),
            watch(self.decoder) as seen,  # after pruning: biases are those of the tokens that are left
            torch.enable_grad(),
        ):
            left = key_bias(torch.stack(bias), most + batch.labels.shape[1])
            seen.bias.update(dict.fromkeys(range(self.layer, len(self.decoder.layers)), left))
            return run(self.decoder, batch)


def tune(
    probe: Probe,
    decoder: Decoder,
    layer: int,
    items: Sequence[Item],
    observations: Sequence[Observation],
    sink: int,
    seed: int,
    steps: int = 400,
    progress: Progress | None = None,
    cuts: Sequence[Cut] = (),
) -> None:
    """Tune the probe in place so that the gated model answers as the dense one does; the model stays as it is.

    observations: of the items, in their order. cuts: what earlier stages left of them; a keep ratio that is tried is
    then what all stages leave together, each the same share of what reached it.
    """
    tuner = Tuner(probe, decoder, layer, items, observations, sink, cuts)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=0.01)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    groups = [chosen for chosen, _ in batches(items, TOKENS, ROWS)]  # the same ones each time: their prefix is known
    queue: list[int] = []
    for step in range(steps):
        queue = queue or rng.permutation(len(groups)).tolist()
        chosen, done = groups[queue.pop()], step / steps
        drawn = rng.choice(KEEPS, len(chosen)) ** (1 / (len(cuts) + 1))
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM) * (1 + math.cos(math.pi * done)) / 2
        with torch.enable_grad():
            loss = tuner.loss(chosen, drawn.tolist(), WARMEST * (COLDEST / WARMEST) ** done, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=list(probe.parameters()))
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress(step + 1)
