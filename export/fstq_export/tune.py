"""Codes trained through rounding: all matrices of a plan at once, towards the model as it was before it had one.

Rounding is a step whose gradient is taken for that of the identity (straight-through), scales learn in their logarithm,
and the loss is the divergence of the next token's distribution. What one layer's rounding does, later layers and other
rows of the same layer then make up for, which a measure of each layer on its own cannot ask for. Like AdaRound (arXiv
2004.10568) it starts at the rounding that is there already, and chooses again; unlike it, weights may leave their cell.
Texts that were not trained on decide which codes are kept: never ones that do worse there than those it began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fstq_export.meter import Meter, quantized
from fstq_export.sensitivity import Weight, batch_tokens, follows, shortened
from fstq_infer.errors import ExportError, OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Batch, Item, collate
from fstq_infer.machine import available_memory
from fstq_infer.quant.codes import SMALLEST, Quantized

TEXTS = 4  # in a step, or fewer where their logits would not fit
FEWEST, FEWEST_TEXTS = 16, 64  # texts to train on; in all, for an export to do so unasked
CODE_RATE, SCALE_RATE = 0.01, 0.001  # of Adam: in steps of a code, and of the scales' logarithm
WARM = 0.05  # share of the steps over which rates rise; then they fall along a cosine
CHECKED, MOST_CHECKED = 8, 64  # every so many-th text is not trained on, but tells which codes to keep
CHECKS = 4  # times that it is asked
STATES = 8 * 4  # bytes per weight: codes, gradient, two moments; number, its gradient; the old weight, the kept codes
LOGIT_COPIES = 6
MOST_TARGETS = 1 << 28  # log-probabilities that stay in memory, 2 bytes each
DEFAULTS = ((1 << 20, 1000), (8 << 20, 200))  # (weights, steps): beyond the last none, as they would take hours


@dataclass(frozen=True, slots=True)
class Tuned:
    """codes: of all weights that were given. before, after: divergence on texts not trained on, nats per token.

    steps: after which these codes were found, 0 for those that were given; of ``asked``.
    """

    codes: Mapping[str, Quantized]
    asked: int
    steps: int
    before: float
    after: float


def default_steps(parameters: int) -> int:
    """Steps that an export takes when nothing else is asked for."""
    return next((steps for most, steps in DEFAULTS if parameters <= most), 0)


def tune(
    decoder: Decoder,
    known: Mapping[str, Weight],
    codes: Mapping[str, Quantized],
    items: Sequence[Item],
    steps: int,
    seed: int,
    progress: Callable[[int], None] = lambda _done: None,
) -> Tuned:
    """Train the codes and scales of the integer formats among ``codes``; the model is left as it was.

    Raises OptionError for too few texts or too little memory, ExportError where training diverges to no number.
    """
    texts = shortened(items)
    held = texts[::CHECKED][:MOST_CHECKED]
    training = [text for number, text in enumerate(texts) if number % CHECKED or number >= CHECKED * MOST_CHECKED]
    if len(training) < FEWEST:
        raise OptionError(
            f"{len(training)} texts are too few to train codes with, at least {FEWEST} are needed; give more "
            "calibration data, or --tune-codes 0"
        )
    count = _at_once(training, decoder)
    targets = _Targets(decoder, training, MOST_TARGETS if steps * count > len(training) else 0)
    _require_memory(decoder, known, codes, count, max(map(len, training)), targets.most)
    trainer = _Trainer(decoder, known, codes, steps)
    meter = Meter(decoder, held)
    meter.measure()

    def divergence(found: Mapping[str, Quantized]) -> float:
        with quantized(known, found):
            return float(meter.measure()["divergence"])

    best, before = dict(codes), divergence(codes)
    least, at = before, 0
    if not trainer.latents:
        return Tuned(best, steps, 0, before, before)
    for number, indices in enumerate(_drawn(len(training), count, steps, seed), 1):
        trainer.step(collate([training[index] for index in indices]), targets.of(indices))
        progress(number)
        if number % max(1, steps // CHECKS) == 0 or number == steps:
            found = trainer.codes()
            if (now := divergence(found)) < least:
                best, least, at = found, now, number
    return Tuned(best, steps, at, before, least)


def _at_once(texts: Sequence[Item], decoder: Decoder) -> int:
    """Texts in a step."""
    return max(1, min(TEXTS, batch_tokens(decoder) // max(map(len, texts))))


def _drawn(texts: int, count: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of ``count`` texts at a time in a random order, each once before any comes again."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < count:
            order = rng.permutation(texts).tolist()
        yield order[:count]
        del order[:count]


def _require_memory(
    decoder: Decoder, known: Mapping[str, Weight], codes: Mapping[str, Quantized], texts: int, longest: int, kept: int
) -> None:
    weights = sum(known[name].size for name, found in codes.items() if found.format.is_integer)
    config: Any = decoder.model.config
    text = config.get_text_config(decoder=True)
    # What a layer keeps for the backward pass: about twenty times its input, and attention weights three times.
    layer = 20 * text.hidden_size + 3 * text.num_attention_heads * longest
    needed = (
        STATES * weights
        + 2 * kept
        + 4 * texts * longest * (LOGIT_COPIES * text.vocab_size + layer * len(decoder.layers))
    )
    free = available_memory()
    if free is not None and needed > free:
        raise OptionError(
            f"training the codes of {weights:,} weights needs about {needed / 2**30:.1f} GiB of memory, but "
            f"{free / 2**30:.1f} GiB are available; close other programs, or leave codes as they are: --tune-codes 0"
        )


class _Targets:
    """Log-probabilities that the model as it is gives; up to ``most`` of them stay for texts that come again."""

    def __init__(self, decoder: Decoder, texts: Sequence[Item], most: int) -> None:
        self.decoder, self.texts = decoder, texts
        config: Any = decoder.model.config
        vocabulary = int(config.get_text_config(decoder=True).vocab_size)
        self.most = min(most, vocabulary * sum(map(len, texts)))
        self._kept: dict[int, torch.Tensor] = {}
        self._room = self.most

    @torch.no_grad()
    def of(self, indices: Sequence[int]) -> torch.Tensor:
        """(N, vocab) of all tokens of these texts that another follows, text by text."""
        missing = [index for index in indices if index not in self._kept]
        found = dict(self._kept)
        if missing:
            batch = collate([self.texts[index] for index in missing])
            logs = _logits(self.decoder, {}, batch).log_softmax(-1)
            for index, part in zip(missing, torch.split(logs, follows(batch).sum(1).tolist()), strict=True):
                found[index] = part
                if part.numel() <= self._room:
                    self._kept[index] = part.half()
                    self._room -= part.numel()
        return torch.cat([found[index].float() for index in indices])


def _logits(decoder: Decoder, numbers: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """(N, vocab) float32 of all tokens that another follows; numbers: parameters to compute with instead, by name."""
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.valid.long(),
        "position_ids": batch.positions,
        "use_cache": False,
    }
    logits: torch.Tensor = functional_call(decoder.model, dict(numbers), (), inputs).logits
    return logits[:, :-1][follows(batch)].float()


class _Trainer:
    """What learns, and how."""

    def __init__(
        self, decoder: Decoder, known: Mapping[str, Weight], codes: Mapping[str, Quantized], steps: int
    ) -> None:
        self.decoder, self.start, self.done = decoder, codes, 0
        self.latents = {name: Latent(known[name], found) for name, found in codes.items() if found.format.is_integer}
        self.fixed = {
            _parameter(known[name]): _stored(known[name], torch.from_numpy(found.dequantize()))
            for name, found in codes.items()
            if name not in self.latents
        }
        if self.latents:
            groups = (("codes", CODE_RATE), ("scales", SCALE_RATE))
            self.optimizer = torch.optim.Adam(
                [
                    {"params": [getattr(one, what) for one in self.latents.values()], "lr": rate}
                    for what, rate in groups
                ],
                fused=True,
            )
            share = WARM * steps
            self.schedule = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda n: min(1.0, (n + 1) / share) * (1 + math.cos(math.pi * n / steps)) / 2
            )

    def step(self, batch: Batch, target: torch.Tensor) -> None:
        """One step of the optimizer. target: (N, vocab) log-probabilities. Raises ExportError for a loss of nan."""
        with torch.enable_grad():  # inputs are not rounded here: it would cost half as much again
            numbers = self.fixed | {_parameter(one.weight): one.number() for one in self.latents.values()}
            logs = _logits(self.decoder, numbers, batch).log_softmax(-1)
            loss = functional.kl_div(logs, target, reduction="batchmean", log_target=True)
        if not math.isfinite(loss.item()):
            raise ExportError(
                f"training codes came to a loss of {loss.item()} in step {self.done + 1}; export with --tune-codes 0"
            )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        self.done += 1

    def codes(self) -> dict[str, Quantized]:
        """All codes as they are now."""
        return {
            name: self.latents[name].quantized() if name in self.latents else found
            for name, found in self.start.items()
        }


def _parameter(weight: Weight) -> str:
    return f"{weight.sites[0].name}.weight"


def _stored(weight: Weight, matrix: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) as the module has it."""
    return matrix.T if isinstance(weight.sites[0].module, Conv1D) else matrix


class Latent:
    """A matrix as numbers to train. codes: (rows, columns) before rounding; scales: (rows, blocks), logarithms."""

    def __init__(self, weight: Weight, found: Quantized) -> None:
        if found.scales is None:
            raise ValueError(f"{weight.name} has no scales to train, its format is {found.format.name}")
        form, columns = found.format, found.codes.shape[1]
        self.form, self.weight = form, weight
        self.block = form.block or columns
        scales = torch.from_numpy(found.scales.astype(np.float32))
        codes = torch.from_numpy(found.codes.astype(np.float32))
        exact = torch.from_numpy(np.ascontiguousarray(weight.matrix)) / self._spread(scales, columns)
        # Within the cell of the code that is there, as near to the weight as may be.
        self.codes = (codes + (exact - codes).clamp(-0.49, 0.49)).requires_grad_()
        self.scales = scales.log().requires_grad_()

    def _spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        return scales.repeat_interleave(self.block, 1)[:, :columns]

    def number(self) -> torch.Tensor:
        """The module's parameter, differentiable."""
        low, high = self.form.levels
        inside = self.codes.clamp(low - 0.49, high + 0.49)
        rounded = inside + (inside.round() - inside).detach()
        return _stored(self.weight, rounded * self._spread(half(self.scales.exp()), self.codes.shape[1]))

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The codes as they are now."""
        low, high = self.form.levels
        codes = self.codes.clamp(low, high).round().numpy().astype(np.int8)
        return Quantized(self.form, codes, half(self.scales.exp()).numpy().astype(np.float16))


def half(scales: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored, with the gradient of the identity."""
    stored = scales.detach().clamp(float(SMALLEST), float(np.finfo(np.float16).max)).half().float()
    return scales + (stored - scales.detach())
