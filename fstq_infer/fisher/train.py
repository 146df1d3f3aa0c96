"""Distilling the probe from pooled sensitivities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from fstq_infer.fisher.probe import Probe, ProbeInput

Progress = Callable[[int], None]


def target(sensitivity: torch.Tensor, window: int, pool: int = 3) -> torch.Tensor:
    """(S,) sensitivities -> (S,) distribution: square root, last ``window`` tokens out (always kept), max-pooled."""
    root = sensitivity.sqrt()
    root[max(0, len(root) - window) :] = 0
    pooled = functional.max_pool1d(root[None, None], pool, 1, pool // 2)[0, 0]
    return pooled / pooled.sum().clamp(min=1e-30)


def distill(
    probe: Probe,
    inputs: Sequence[ProbeInput],
    targets: Sequence[torch.Tensor],
    seed: int,
    epochs: int = 5,
    progress: Progress | None = None,
) -> None:
    """Fit the probe's softmax to the targets (KL), AdamW, 16 items a step, linear decay."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(inputs)), key=lambda i: len(targets[i]))
    groups = [order[i : i + 16] for i in range(0, len(order), 16)]
    for epoch in range(epochs):
        for group_index in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[group_index]
            for settings in optimizer.param_groups:
                settings["lr"] = 3e-3 * (1 - epoch / epochs)
            x = ProbeInput.pad([inputs[i] for i in group])
            size = x.valid.shape[1]
            wanted = torch.stack([functional.pad(targets[i], (size - len(targets[i]), 0)) for i in group])
            scores = probe(x).masked_fill(~x.valid, -1e4)
            loss = -(wanted * scores.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        if progress:
            progress(epoch + 1)
