"""Token sensitivities by one backward pass per batch: gate scores for every layer at once, and embedding scores.

A presence gate ``m_i`` multiplies token i as a key for all other queries in the layers at and after a prune layer; as
an additive bias ``log m_i`` on its attention logits it needs no change to the model. With one bias per layer the
gradient for prune layer l is the sum over the layers from l on, so a single pass serves every candidate. Scores are
squared gradients of the answer's margin (logit minus mean), which does not vanish where the loss saturates.

What published scorers read comes from the same pass, with the prune layers' projections and the head run once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fstq_infer.fisher.hooks import Call, Decoder, Heads, Seen, drop_bias, heads, key_bias, watch
from fstq_infer.fisher.items import Batch, Cut, Item, batches
from fstq_infer.fisher.probe import QUERIES, ProbeInput
from fstq_infer.fisher.scores import Array, Evidence, expected_attention

ANSWER_TOP = 64
AHEAD = 512  # future positions that expected attention averages over
HEAD_TOKENS = 512  # logits in memory at once; vocabularies are large


@dataclass(frozen=True, slots=True)
class Observation:
    """One item as seen by the dense model, or behind earlier pruning stages.

    S counts the prompt tokens that are still there, A answer tokens.

    gate: (L, S) for prune layers 0..L-1; row 0 gates all layers. embedding: (S,). inputs: prune layer -> features.
    window: prune layer -> (H, Q, S) attention of the last Q queries in the layer before, half precision.
    likely, weight: (A, K) ids and probabilities of the dense model's K most likely tokens at each answer position.
    exact: whether the dense model's greedy answer is the label. nll: its mean negative log-likelihood, nats per token.
    own, key_norm, expected: prune layer -> as in :class:`Evidence`; surprise: (S,). For published scorers, where asked.
    """

    gate: torch.Tensor
    embedding: torch.Tensor
    inputs: dict[int, ProbeInput]
    window: dict[int, torch.Tensor]
    likely: torch.Tensor
    weight: torch.Tensor
    exact: bool
    nll: float
    own: dict[int, torch.Tensor] = field(default_factory=dict)
    key_norm: dict[int, torch.Tensor] = field(default_factory=dict)
    expected: dict[int, torch.Tensor] = field(default_factory=dict)
    surprise: torch.Tensor | None = None

    def evidence(self, layer: int, probe: Array | None = None, seed: int = 0) -> Evidence:
        """What scorers may read at a prune layer; ``probe``: (S,) scores of one."""

        def array(found: torch.Tensor | None) -> Array | None:
            return None if found is None else found.numpy()

        return Evidence(
            attention=self.window[layer].float().numpy(),
            gate=self.gate[layer].numpy(),
            embedding=self.embedding.numpy(),
            probe=probe,
            own=array(self.own.get(layer)),
            key_norm=array(self.key_norm.get(layer)),
            expected=array(self.expected.get(layer)),
            surprise=array(self.surprise),
            seed=seed,
        )


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
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none") * mask
    return hit, losses.sum(1) / mask.sum(1)


@dataclass(frozen=True, slots=True)
class Present:
    """The prompt tokens of a batch that are still there, padded on the left.

    columns: (B, K) int64, where they are in the batch. valid: (B, K) bool.
    """

    columns: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, kept: Sequence[NDArray[np.int64]] | None = None) -> Present:
        """kept: per row, ascending indices into its own prompt; None: all."""
        kept = [np.arange(n) for n in batch.lengths] if kept is None else kept
        size = max(map(len, kept))
        columns = torch.zeros(len(kept), size, dtype=torch.long)
        valid = torch.zeros(len(kept), size, dtype=torch.bool)
        for row, (indices, length) in enumerate(zip(kept, batch.lengths, strict=True)):
            columns[row, size - len(indices) :] = torch.from_numpy(indices) + batch.prompt - length
            valid[row, size - len(indices) :] = True
        return cls(columns, valid)

    @property
    def alone(self) -> Present:
        """The same tokens when no others are left."""
        return Present(torch.arange(self.columns.shape[1]).expand_as(self.columns), self.valid)

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, ...) -> (B, K, ...)."""
        return states[torch.arange(len(states))[:, None], self.columns]

    def attention(self, weights: torch.Tensor, queries: int) -> torch.Tensor:
        """(B, H, S, S) -> (B, H, min(queries, K), K): of the last queries over the tokens."""
        last = self.columns[:, -queries:]
        rows = weights[torch.arange(len(weights))[:, None], :, last].transpose(1, 2)
        return rows.gather(3, self.columns[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1))


def after(cuts: Sequence[Cut], indices: Sequence[int], batch: Batch, layers: int) -> dict[int, torch.Tensor]:
    """The biases by layer that hide what earlier stages dropped of a batch of items ``indices``."""
    biases: dict[int, torch.Tensor] = {}
    for cut in cuts:
        bias = drop_bias([cut.kept[i] for i in indices], batch)
        biases |= dict.fromkeys(range(cut.layer, layers), bias)
    return biases


def left(cuts: Sequence[Cut], indices: Sequence[int], batch: Batch) -> Present:
    """The prompt tokens of a batch of items ``indices`` that the last of the earlier stages left."""
    return Present.of(batch, [cuts[-1].kept[i] for i in indices] if cuts else None)


def features(
    seen: Seen, layer: int, batch: Batch, present: Present, queries: int, now: Present | None = None
) -> ProbeInput:
    """What a probe before ``layer`` reads; needs hidden 0, hidden ``layer`` and attention ``layer - 1`` watched.

    now: where the same tokens are in what the layer sees, if others have left.
    """
    now = now or present
    return ProbeInput.of(
        now.take(seen.hidden[layer]),
        present.take(seen.hidden[0]),
        now.attention(seen.attention[layer - 1], queries),
        present.take(batch.ids),
        present.valid,
        present.valid & (present.columns >= batch.prompt - queries),
    )


def observe(
    decoder: Decoder,
    items: Sequence[Item],
    layers: Sequence[int],
    queries: int = QUERIES,
    progress: Callable[[int], None] | None = None,
    published: bool = False,
    cuts: Sequence[Cut] = (),
) -> list[Observation]:
    """Observe all items; ``layers`` are the candidate prune layers (1 or more), whose features are recorded.

    progress is called with the number of items done after each batch. published: record what published scorers need.
    cuts: of earlier stages, before all candidates; what they drop is no part of what is observed from there on.
    """
    found: list[Observation | None] = [None] * len(items)
    done = 0
    for indices, batch in batches(items):
        hidden, present = after(cuts, indices, batch, len(decoder.layers)), left(cuts, indices, batch)
        observed = _observe(decoder, batch, tuple(layers), queries, published, hidden, present)
        for index, observation in zip(indices, observed, strict=True):
            found[index] = observation
        done += len(indices)
        if progress:
            progress(done)
    return [o for o in found if o is not None]


def _observe(
    decoder: Decoder,
    batch: Batch,
    layers: tuple[int, ...],
    queries: int,
    published: bool,
    hidden: dict[int, torch.Tensor],
    present: Present,
) -> list[Observation]:
    rows, prompt = len(batch.ids), batch.prompt
    gates = [torch.zeros(rows, prompt, requires_grad=True) for _ in decoder.layers]
    own = layers if published else ()
    outputs: list[Any] = []
    with (
        torch.enable_grad(),
        decoder.base.register_forward_hook(lambda _module, _args, output: outputs.append(output)),
        watch(
            decoder,
            hidden=(0, *layers),
            attention=(*(p - 1 for p in layers), *own),
            calls=own,
            before={0: _keep_gradient},
        ) as seen,
    ):
        for i, gate in enumerate(gates):
            bias = key_bias(gate, batch.ids.shape[1])
            seen.bias[i] = bias + hidden[i] if i in hidden else bias
        logits = run(decoder, batch)
        picked = logits.gather(2, batch.labels[..., None])[..., 0]
        margin = ((picked - logits.mean(-1)) * batch.answer_mask).sum()
        gradients = torch.autograd.grad(margin, [*gates, seen.hidden[0]])
    per_layer = torch.stack(gradients[:-1])
    score = per_layer.flip(0).cumsum(0).flip(0) ** 2
    embedding = (gradients[-1][:, :prompt] ** 2).sum(-1)
    with torch.no_grad():
        likely = logits.detach().softmax(-1).topk(min(ANSWER_TOP, logits.shape[-1]))
        hit, nll = outcome(logits.detach(), batch)
        windows = {p: present.attention(seen.attention[p - 1].detach(), queries) for p in layers}
        inputs = {p: features(seen, p, batch, present, queries) for p in layers}
    out = []
    for row in range(rows):
        there, a = present.valid[row], batch.answer_mask[row]
        v, shown = present.columns[row, there], min(queries, int(there.sum()))
        out.append(
            Observation(
                gate=score[:, row, v],
                embedding=embedding[row, v],
                inputs={p: inputs[p].row(row) for p in layers},
                window={p: windows[p][row, :, -shown:, there].half() for p in layers},
                likely=likely.indices[row, a],
                weight=likely.values[row, a],
                exact=bool(hit[row]),
                nll=float(nll[row]),
            )
        )
    return _published(decoder, seen, outputs[0], batch, present, queries, out) if published else out


def _published(
    decoder: Decoder,
    seen: Seen,
    output: Any,
    batch: Batch,
    present: Present,
    queries: int,
    plain: list[Observation],
) -> list[Observation]:
    """The observations with what published scorers read. output: the decoder's, before its head."""
    out = []
    with torch.no_grad():
        nll = surprise(decoder, output, batch)
        caught = {p: h for p, call in seen.calls.items() if (h := future_heads(decoder.attentions[p], call, batch))}
        for row, observation in enumerate(plain):
            v = present.columns[row, present.valid[row]]
            expected = {}
            for p, h in caught.items():
                q, k, values = (x[row][:, v].numpy() for x in (h.query, h.key, h.value))
                expected[p] = torch.from_numpy(expected_attention(q, k, values, h.scale))
            out.append(
                replace(
                    observation,
                    own={p: seen.attention[p][row][:, v[-queries:]][..., v].mean((0, 1)) for p in observation.window},
                    key_norm={p: h.key[row][:, v].norm(dim=-1).mean(0) for p, h in caught.items()},
                    expected=expected,
                    surprise=nll[row, v],
                )
            )
    return out


def future_heads(attention: nn.Module, call: Call, batch: Batch) -> Heads | None:
    """Heads with queries rotated by the average of the rotations of the ``AHEAD`` positions after the prompt.

    Rotations are linear in their cosines and sines, so the attention module itself applies the average ones, whatever
    its layout. Without rotary embeddings, queries are as in the prompt.
    """
    now, rotary = heads(attention, call), call[1].get("position_embeddings")
    if now is None or not isinstance(rotary, tuple):
        return now
    cos, sin = rotary
    mean_cos, mean_sin = (x[:, None].expand_as(cos) for x in average_rotation(cos, sin, batch))
    future = heads(attention, call, position_embeddings=(mean_cos, mean_sin))
    return future and replace(now, query=future.query)


def average_rotation(cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D) cosines and sines averaged over the ``AHEAD`` positions after each prompt, from those (B, S, D) in it.

    Position 1 tells each dimension's angle per position, and its scale.
    """
    rows = torch.arange(len(cos))
    first = (batch.positions == 1).int().argmax(1)
    cos, sin = cos[rows, first], sin[rows, first]
    steps = batch.prompt_valid.sum(1, keepdim=True) + torch.arange(AHEAD)
    angles = torch.atan2(sin, cos)[:, None] * steps[..., None]
    scale = torch.hypot(sin, cos)
    return scale * angles.cos().mean(1), scale * angles.sin().mean(1)


def surprise(decoder: Decoder, output: Any, batch: Batch) -> torch.Tensor:
    """(B, prompt) negative log-likelihood of each prompt token in nats; 0 for the first.

    output: the decoder's for this batch. A hook puts it in place of what one token gives, so that only the head works.
    """
    found = torch.zeros(batch.ids.shape[0], batch.prompt)
    step = max(1, HEAD_TOKENS // len(found))
    with decoder.base.register_forward_hook(lambda *_: output):
        for start in range(1, batch.prompt, step):
            columns = torch.arange(start, min(start + step, batch.prompt))
            kept = {"use_cache": False, "logits_to_keep": columns - 1}
            logits = decoder.model(input_ids=batch.ids[:, :1], **kept).logits.float()
            wanted = batch.ids[:, columns]
            losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            found[:, columns] = losses.view_as(wanted)
    return found * (batch.positions[:, : batch.prompt] > 0)


def _keep_gradient(seen: Seen) -> None:
    """Before layer 0: the embeddings of a frozen model become a leaf, so that a gradient can be taken at them."""
    seen.hidden[0].requires_grad_(True)
