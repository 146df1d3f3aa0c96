"""Token sensitivities by one backward pass per batch: gate scores for every layer at once, and embedding scores.

A presence gate ``m_i`` multiplies token i as a key for all other queries in the layers at and after a prune layer; as
an additive bias ``log m_i`` on its attention logits it needs no change to the model. With one bias per layer the
gradient for prune layer l is the sum over the layers from l on, so a single pass serves every candidate. Scores are
squared gradients of the answer's margin (logit minus mean), which does not vanish where the loss saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fstq_infer.fisher.hooks import Decoder, Seen, key_bias, watch
from fstq_infer.fisher.items import Batch, Item, batches
from fstq_infer.fisher.probe import ProbeInput

ANSWER_TOP = 64


@dataclass(frozen=True, slots=True)
class Observation:
    """One item as seen by the dense model. S counts prompt tokens, A answer tokens.

    gate: (L, S) for prune layers 0..L-1; row 0 gates all layers. embedding: (S,). inputs: prune layer -> features.
    window: prune layer -> (H, W, S) attention of the last W queries in the layer before, half precision.
    likely, weight: (A, K) ids and probabilities of the dense model's K most likely tokens at each answer position.
    exact: whether the dense model's greedy answer is the label. nll: its mean negative log-likelihood, nats per token.
    """

    gate: torch.Tensor
    embedding: torch.Tensor
    inputs: dict[int, ProbeInput]
    window: dict[int, torch.Tensor]
    likely: torch.Tensor
    weight: torch.Tensor
    exact: bool
    nll: float


def run(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """Logits (B, A, vocab) at the positions that predict the answer tokens."""
    model = decoder.model
    output = model(
        input_ids=batch.ids,
        attention_mask=batch.valid.long(),
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=batch.ids.shape[1] - batch.prompt + 1,
    )
    logits: torch.Tensor = output.logits[:, :-1]
    return logits.float()


def outcome(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """((B,) bool exact match, (B,) mean negative log-likelihood in nats per token) under logits (B, A, vocab)."""
    mask = batch.answer_mask
    hit = ((logits.argmax(-1) == batch.labels) | ~mask).all(1)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none") * mask
    return hit, losses.sum(1) / mask.sum(1)


def features(seen: Seen, layer: int, batch: Batch) -> ProbeInput:
    """What a probe before ``layer`` reads; needs hidden 0, hidden ``layer`` and attention ``layer - 1`` watched."""
    prompt = batch.prompt
    return ProbeInput.of(
        seen.hidden[layer][:, :prompt],
        seen.hidden[0][:, :prompt],
        seen.attention[layer - 1][..., :prompt],
        batch.ids[:, :prompt],
        batch.prompt_valid,
    )


def observe(
    decoder: Decoder,
    items: Sequence[Item],
    layers: Sequence[int],
    window: int,
    progress: Callable[[int], None] | None = None,
) -> list[Observation]:
    """Observe all items; ``layers`` are the candidate prune layers (1 or more), whose features are recorded.

    progress is called with the number of items done after each batch.
    """
    found: list[Observation | None] = [None] * len(items)
    done = 0
    for indices, batch in batches(items):
        for index, observation in zip(indices, _observe(decoder, batch, tuple(layers), window), strict=True):
            found[index] = observation
        done += len(indices)
        if progress:
            progress(done)
    return [o for o in found if o is not None]


def _observe(decoder: Decoder, batch: Batch, layers: tuple[int, ...], window: int) -> list[Observation]:
    rows, prompt = len(batch.ids), batch.prompt
    gates = [torch.zeros(rows, prompt, requires_grad=True) for _ in decoder.layers]
    with (
        torch.enable_grad(),
        watch(
            decoder,
            hidden=(0, *layers),
            attention=tuple(p - 1 for p in layers),
            queries=slice(max(0, prompt - window), prompt),
            before={0: _keep_gradient},
        ) as seen,
    ):
        seen.bias.update({i: key_bias(gate, batch.ids.shape[1]) for i, gate in enumerate(gates)})
        logits = run(decoder, batch)
        picked = logits.gather(2, batch.labels[..., None])[..., 0]
        margin = ((picked - logits.mean(-1)) * batch.answer_mask).sum()
        gradients = torch.autograd.grad(margin, [*gates, seen.hidden[0]])
    per_layer = torch.stack(gradients[:-1])
    gate = per_layer.flip(0).cumsum(0).flip(0) ** 2
    embedding = (gradients[-1][:, :prompt] ** 2).sum(-1)
    with torch.no_grad():
        likely = logits.detach().softmax(-1).topk(min(ANSWER_TOP, logits.shape[-1]))
        hit, nll = outcome(logits.detach(), batch)
        windows = {p: seen.attention[p - 1].detach()[..., :prompt] for p in layers}
        inputs = {p: features(seen, p, batch) for p in layers}
    out = []
    for row in range(rows):
        v, a = batch.prompt_valid[row], batch.answer_mask[row]
        shown = min(window, int(v.sum()))
        out.append(
            Observation(
                gate=gate[:, row, v],
                embedding=embedding[row, v],
                inputs={p: inputs[p].row(row) for p in layers},
                window={p: windows[p][row, :, -shown:, v].half() for p in layers},
                likely=likely.indices[row, a],
                weight=likely.values[row, a],
                exact=bool(hit[row]),
                nll=float(nll[row]),
            )
        )
    return out


def _keep_gradient(seen: Seen) -> None:
    """Before layer 0: the embeddings of a frozen model become a leaf, so that a gradient can be taken at them."""
    seen.hidden[0].requires_grad_(True)
