"""Training the probe: distillation from pooled sensitivities, then tuning through soft gates in the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from fstq_infer.fisher.gates import Observation, Present, after, features, left, run
from fstq_infer.fisher.hooks import Decoder, Seen, key_bias, watch
from fstq_infer.fisher.items import Batch, Cut, Item, collate
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.select import keep_count

Progress = Callable[[int], None]
KEEPS = (0.5, 0.25, 0.25, 0.125)  # keep ratios seen while tuning


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
            _update(optimizer, probe, loss)
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


@dataclass(slots=True)
class SoftGates:
    """Gates ``layers`` by the probe's scores; called as the first of them starts, within the forward pass.

    keeps: for each row of ``batch``, the share that stays of the tokens that are there: of ``present``, all by default.
    hidden: biases by layer that hide what earlier stages dropped. excess: of kept mass, once called; see
    :func:`soft_bias`.
    """

    probe: Probe
    layers: range
    batch: Batch
    keeps: Sequence[float]
    sink: int
    temperature: float
    excess: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    present: Present | None = None
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, seen: Seen) -> None:
        present = self.present or Present.of(self.batch)
        scores = self.probe(features(seen, self.layers.start, self.batch, present, self.probe.queries))
        bias, self.excess = soft_bias(scores, present.valid, self.keeps, self.sink, self.probe.window, self.temperature)
        spread = torch.zeros(len(bias), self.batch.prompt).scatter_add(1, present.columns, bias)  # padding adds 0
        full = key_bias(spread, self.batch.ids.shape[1])
        seen.bias.update({n: full + self.hidden[n] if n in self.hidden else full for n in self.layers})


def gated_loss(decoder: Decoder, gates: SoftGates, observations: Sequence[Observation]) -> torch.Tensor:
    """Cross-entropy to the dense model's answers, as observed for each row, plus twice the excess of kept mass."""
    layer = gates.layers.start
    with watch(decoder, hidden=(0, layer), attention=(layer - 1,), before={layer: gates}) as seen:
        seen.bias.update(gates.hidden)
        logits = run(decoder, gates.batch)
    loss = 2 * gates.excess
    for row, dense in enumerate(observations):
        logp = logits[row, : len(dense.likely)].log_softmax(-1).gather(1, dense.likely)
        loss = loss - (dense.weight * logp).sum(-1).mean() / len(observations)
    return loss


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
    cuts: Sequence[Cut] = (),
) -> None:
    """Tune the probe in place so that the gated model answers as the dense one does; the model stays as it is.

    observations: of the items, in their order. cuts: what earlier stages left of them; a keep ratio that is tried is
    then what all stages leave together, each the same share of what reached it. The temperature falls from 1 to 0.15;
    lower ones, and many more steps, were seen to ruin the probe.
    """
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    rows = min(rows, len(items))
    layers = range(layer, len(decoder.layers))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        temperature = max(0.15, 1 - step / steps)
        # Neighbours in length share a batch; a random shift keeps the groups from being the same ones each time.
        first = int(torch.randint(len(order) - rows + 1, (1,), generator=generator))
        chosen = order[first : first + rows]
        drawn = (KEEPS[int(torch.randint(len(KEEPS), (1,), generator=generator))] for _ in chosen)
        keeps = [keep ** (1 / (len(cuts) + 1)) for keep in drawn]
        batch = collate([items[i] for i in chosen])
        gates = SoftGates(probe, layers, batch, keeps, sink, temperature)
        if cuts:
            gates.present, gates.hidden = left(cuts, chosen, batch), after(cuts, chosen, batch, layers.stop)
        with torch.enable_grad():
            loss = gated_loss(decoder, gates, [observations[i] for i in chosen])
        _update(optimizer, probe, loss, clip=1.0)
        if progress:
            progress(step + 1)


def _update(optimizer: torch.optim.Optimizer, probe: Probe, loss: torch.Tensor, clip: float | None = None) -> None:
    """One step on the probe; gradients reach its parameters only, whether or not the model's are frozen."""
    optimizer.zero_grad()
    torch.autograd.backward(loss, inputs=list(probe.parameters()))
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(probe.parameters(), clip)
    optimizer.step()
