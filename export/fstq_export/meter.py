"""What a model with other weights loses on held-out texts: loss, answers, divergence; and how it gets such weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fstq_export.sensitivity import Weight, batch_tokens, predictions, shortened, weights
from fstq_export.streamed import StreamedLinear
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item, batches
from fstq_infer.quant.codes import INPUT_LEVELS, TINY, Quantized
from fstq_infer.quant.formats import Format

TEXTS = 256  # held-out texts that are measured
REFERENCE = 1 << 26  # log-probabilities of the model as it is that stay in memory, to measure divergence


class Meter:
    """Measures a model as it stands on held-out texts; the first measurement is what others are compared with."""

    def __init__(self, decoder: Decoder, held: Sequence[Item]) -> None:
        self.decoder = decoder
        self.items = shortened(held)[:TEXTS]
        self.texts, self.tokens = len(self.items), 0
        self._reference: list[torch.Tensor] | None = None

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """nll: nats per token of all text. answers: of the answers alone. exact: share of answers that greedy decoding
        gives. divergence: KL from the first measured model, nats per token."""
        losses = tokens = answered = answer_losses = exact = divergence = compared = 0.0
        first, kept = self._reference is None, self._reference or []
        room = REFERENCE
        for number, (_, batch) in enumerate(batches(self.items, tokens=batch_tokens(self.decoder))):
            logits, following, follows = predictions(self.decoder, batch)
            loss = functional.cross_entropy(logits, following, reduction="none") * follows
            losses, tokens = losses + float(loss.sum()), tokens + float(follows.sum())
            rows = len(batch.ids)
            answers = batch.answer_mask & batch.valid[:, batch.prompt - 1 : -1]
            wanted = loss.view(rows, -1)[:, batch.prompt - 1 :]
            answer_losses, answered = answer_losses + float((wanted * answers).sum()), answered + float(answers.sum())
            hits = logits.argmax(-1).view(rows, -1)[:, batch.prompt - 1 :] == batch.labels
            exact += float((hits | ~answers).all(1).sum())
            logs = logits.log_softmax(-1)[follows]
            if first and not kept:  # of long texts over a large vocabulary, as much as there is room for
                logs = logs[: max(1, REFERENCE // logs.shape[-1])]
            if first and logs.numel() <= room:
                kept.append(logs)
                room -= logs.numel()
            elif not first and number < len(kept):
                logs = logs[: len(kept[number])]
                divergence += float(functional.kl_div(logs, kept[number], reduction="sum", log_target=True))
                compared += len(logs)
            elif first:
                room = 0
        self._reference, self.tokens = kept, int(tokens)
        return {
            "nll": losses / max(tokens, 1),
            "answers": answer_losses / answered if answered else None,
            "exact": exact / max(len(self.items), 1) if answered else None,
            "divergence": divergence / compared if compared else 0.0,
        }


@contextmanager
def quantized(known: Mapping[str, Weight], codes: Mapping[str, Quantized]) -> Iterator[None]:
    """The model as an engine for the CPU computes it: dequantized weights, and inputs of integer layers rounded."""
    with rounding_inputs(known, codes), ExitStack() as stack:
        for name, found in codes.items():
            stack.callback(_restored(known[name]))
            _write(known[name], found)
        yield


@contextmanager
def rounding_inputs(known: Mapping[str, Weight], codes: Mapping[str, Quantized]) -> Iterator[None]:
    """The model with inputs of integer layers rounded, its weights as they are."""
    with ExitStack() as stack:
        for name, found in codes.items():
            for site in known[name].sites:
                if not site.lookup and found.format.inputs is not None:
                    stack.callback(site.module.register_forward_pre_hook(_rounding(found.format)).remove)
        yield


def _rounding(form: Format) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return rounded(args[0], form), *args[1:]

    return hook


def rounded(inputs: torch.Tensor, form: Format) -> torch.Tensor:
    """(..., columns) as :func:`fstq_infer.quant.codes.rounded_inputs` does it, with the gradient of the identity."""
    columns = inputs.shape[-1]
    block = min(form.inputs or columns, columns)
    exact = inputs.detach()
    padded = functional.pad(exact, (0, -columns % block))
    blocks = padded.view(*padded.shape[:-1], -1, block)
    steps = blocks.abs().amax(-1, keepdim=True).clamp(min=float(TINY)) / INPUT_LEVELS
    whole: torch.Tensor = (blocks / steps).round_().mul_(steps).flatten(-2)[..., :columns]
    return inputs + (whole - exact)


def quantize_in_place(decoder: Decoder, codes: Mapping[str, Quantized]) -> None:
    """Give a model dequantized weights for good: the reference that a quantized graph is checked against."""
    known = weights(decoder)
    for name, found in codes.items():
        _write(known[name], found)


def _write(weight: Weight, found: Quantized) -> None:
    """A resident weight becomes the codes' numbers; a streamed one is made of the codes at each use."""
    if not any(isinstance(site.module, StreamedLinear) for site in weight.sites):
        weight.matrix[...] = found.dequantize()
    for site in weight.sites:
        if isinstance(site.module, StreamedLinear):
            site.module.numbers = lambda: torch.from_numpy(found.dequantize())


def _restored(weight: Weight) -> Callable[[], None]:
    """What brings a weight back as it is now."""
    streamed = [(s.module, s.module.numbers) for s in weight.sites if isinstance(s.module, StreamedLinear)]
    before = None if streamed else weight.matrix.copy()

    def restore() -> None:
        if before is not None:
            weight.matrix[...] = before
        for module, numbers in streamed:
            module.numbers = numbers

    return restore
