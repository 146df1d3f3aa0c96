"""Training the probe: distillation from pooled sensitivities, then tuning through soft gates in the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from fstq_infer.fisher.gates import Observation, run
from fstq_infer.fisher.hooks import Decoder, Seen, key_bias, watch
from fstq_infer.fisher.items import Item, collate
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.select import keep_count

Progress = Callable[[int], None]
KEEPS = (0.5, 0.25, 0.25, 0.125)  # keep ratios seen while tuning


def target(sensitivity: torch.Tensor, window: int, pool: int = 7) -> torch.Tensor:
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
    epochs: int = 8,
    progress: Progress | None = None,
) -> None:
    """Fit the probe's softmax to the targets (KL), AdamW, 8 items a step, linear decay."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(inputs)), key=lambda i: len(targets[i]))
    groups = [order[i : i + 8] for i in range(0, len(order), 8)]
    for epoch in range(epochs):
        for group_index in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[group_index]
            for settings in optimizer.param_groups:
                settings["lr"] = 2e-3 * (1 - epoch / epochs)
            x = ProbeInput.pad([inputs[i] for i in group])
            size = x.valid.shape[1]
            wanted = torch.stack([functional.pad(targets[i], (size - len(targets[i]), 0)) for i in group])
            scores = probe(x).masked_fill(~x.valid, -1e4)
            loss = -(wanted * scores.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if progress:
            progress(epoch + 1)


def soft_bias(
    scores: torch.Tensor, valid: torch.Tensor, keeps: Sequence[float], sink: int, window: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """((B, S) log gates, scalar excess of kept mass): a sigmoid around each row's k-th largest free score.

    Forced tokens (sink, window) and padding have log gate 0.
    """
    size = scores.shape[1]
    column = torch.arange(size)
    start = size - valid.sum(1, keepdim=True)
    forced = (column - start < sink) | (column >= size - window)
    free = valid & ~forced
    rows, excess = [], []
    for row, ratio in enumerate(keeps):
        n = int(valid[row].sum())
        budget = keep_count(n, ratio, sink, window) - int((valid[row] & forced[row]).sum())
        mine = scores[row][free[row]]
        if not len(mine):
            rows.append(torch.zeros(size))
            continue
        threshold = mine.detach().topk(min(max(budget, 1), len(mine))).values[-1]
        gate = (scores[row] - threshold) / temperature
        rows.append(torch.where(free[row], functional.logsigmoid(gate), torch.zeros(size)))
        excess.append(functional.relu(gate[free[row]].sigmoid().mean() - budget / len(mine)))
    return torch.stack(rows), torch.stack(excess).mean() if excess else torch.zeros(())


def tune(
    probe: Probe,
    decoder: Decoder,
    layer: int,
    items: Sequence[Item],
    observations: Sequence[Observation],
    sink: int,
    seed: int,
    steps: int = 400,
    rows: int = 8,
    progress: Progress | None = None,
) -> None:
    """Tune the probe in place so that the gated model answers as the dense one does.

    Loss: cross-entropy to the dense model's answer distribution, plus twice the excess of kept mass. The temperature falls from 1
    to 0.15; lower ones, and many more steps, were seen to ruin the probe.
    """
    window = probe.window
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    rows = min(rows, len(items))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        temperature = max(0.15, 1 - step / steps)
        first = int(torch.randint(len(order) - rows + 1, (1,), generator=generator))
        # Neighbours in length share a batch; a random shift keeps the groups from being the same ones each time.
        chosen = order[first : first + rows]
        keeps = [KEEPS[int(torch.randint(len(KEEPS), (1,), generator=generator))] for _ in chosen]
        batch = collate([items[i] for i in chosen])
        prompt, total = batch.prompt, batch.ids.shape[1]
        excess: list[torch.Tensor] = []

        def gate(seen: Seen, keeps: list[float] = keeps, excess: list[torch.Tensor] = excess, batch=batch) -> None:  # type: ignore[no-untyped-def]
            size = batch.prompt
            x = ProbeInput.of(
                seen.hidden[layer][:, :size],
                seen.hidden[0][:, :size],
                seen.attention[layer - 1][..., :size],
                batch.ids[:, :size],
                batch.prompt_valid,
            )
            bias, over = soft_bias(probe(x), batch.prompt_valid, keeps, sink, window, temperature)
            excess.append(over)
            seen.bias.update(dict.fromkeys(range(layer, len(decoder.layers)), key_bias(bias, batch.ids.shape[1])))

        with (
            torch.enable_grad(),
            watch(
                decoder,
                hidden=(0, layer),
                attention=(layer - 1,),
                queries=slice(max(0, prompt - window), prompt),
                before={layer: gate},
            ),
        ):
            logits = run(decoder, batch)
            loss = 2 * excess[0]
            for row, i in enumerate(chosen):
                seen_item = observations[i]
                logp = logits[row, : len(seen_item.likely)].log_softmax(-1).gather(1, seen_item.likely)
                loss = loss - (seen_item.weight * logp).sum(-1).mean() / len(chosen)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        if progress:
            progress(step + 1)
        del total
