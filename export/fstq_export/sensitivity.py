"""What each weight matrix's errors cost: inputs and loss gradients of sampled tokens, and the damage that follows.

One forward and one backward pass over texts, with next tokens drawn from the model itself: their gradients make up the
Fisher information, the curvature of the divergence from the model as it is. Of sampled tokens t the inputs x_t of every
matrix and the gradients g_t at its outputs go to files, so that memory holds one matrix's samples at a time. A matrix
that is W + E instead of W then adds about ``1/2 sum_t sum_o (g_to)^2 (E x_t)_o^2``: Fisher times actual output error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fstq_export.streamed import StreamedLinear
from fstq_infer.errors import UnsupportedModelError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Batch, Item, batches
from fstq_infer.quant.codes import Matrix, Quantized, quantize, rounded_inputs
from fstq_infer.quant.formats import Format

WINDOW = 512  # last tokens of a text that are read
LOGITS = 1 << 26  # in memory at once
SAMPLED = 1 << 27  # numbers kept on disk, 4 bytes each, over all matrices
FEWEST, MOST = 256, 32768  # sampled tokens
SPARSE = 4  # of so many tokens that are computed, one is sampled where there are more texts than room
LARGEST = 1 << 26  # numbers kept of one matrix
CHUNK = 1 << 24  # output errors in memory at once
HELD = 4  # every so many-th sample measures damage, the others fit scales and codes


@dataclass(frozen=True, slots=True)
class Site:
    """A module that computes with a weight. lookup: an embedding, whose rows are scaled by ``scale``."""

    name: str
    module: nn.Module
    lookup: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight matrix by the name of its first owner, and all its sites: two where head and embedding tie."""

    name: str
    sites: tuple[Site, ...]

    @property
    def matrix(self) -> Matrix:
        """(outputs, inputs); a view, but of a streamed layer read anew."""
        return matrix(self.sites[0].module)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return shape(self.sites[0].module)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a module's weight."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def matrix(module: nn.Module) -> Matrix:
    """A module's weight as (outputs, inputs); a view, but of a streamed layer read anew."""
    if isinstance(module, StreamedLinear):
        numbers: Matrix = module.numbers().numpy()
        return numbers
    found = module.weight
    weight: Matrix = found.detach().numpy()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def weights(decoder: Decoder) -> dict[str, Weight]:
    """Embedding, head and every linear layer of a model, by name, in the model's order."""
    model: Any = decoder.model
    embedding = model.get_input_embeddings()
    owners: dict[int, list[Site]] = {}
    for name, module in model.named_modules():
        if module is embedding:
            site = Site(name, module, True, float(getattr(module, "scalar_embed_scale", 1.0)))
        elif isinstance(module, nn.Linear | Conv1D):
            site = Site(name, module, False)
        else:
            continue
        owners.setdefault(id(module.weight), []).append(site)
    return {sites[0].name: Weight(sites[0].name, tuple(sites)) for sites in owners.values()}


@dataclass(frozen=True, slots=True)
class Samples:
    """inputs: (T, in), of a lookup (T,) ids. gradients: (T, out) of the summed loss."""

    inputs: NDArray[Any]
    gradients: Matrix


class Collector:
    """Fills sample files in ``folder`` while texts run through the model, and finds which matrices read one input."""

    def __init__(self, decoder: Decoder, folder: Path, seed: int) -> None:
        self.decoder, self.folder = decoder, folder
        self.weights = weights(decoder)
        self.rng = np.random.default_rng(seed)
        self.draws = torch.Generator().manual_seed(seed)
        self.groups: dict[str, tuple[str, ...]] = {}
        self._sites = [site for weight in self.weights.values() for site in weight.sites]
        self._files: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        self._filled: dict[str, int] = {}
        self._inputs: dict[str, torch.Tensor] = {}

    def run(self, items: Sequence[Item], progress: Callable[[int], None]) -> dict[str, Samples]:
        """Samples by site. items: texts; of long ones the last tokens. progress: items done."""
        texts = self._enough(shortened(items))
        tokens = sum(map(len, texts))
        self._open(tokens)
        done = 0
        for indices, batch in batches(texts, tokens=batch_tokens(self.decoder)):
            self._batch(batch, tokens)
            done += len(indices)
            progress(done * len(items) // len(texts))
        self.groups = self._grouped()
        self._inputs.clear()
        return {
            name: Samples(inputs[: self._filled[name]], gradients[: self._filled[name]])
            for name, (inputs, gradients) in self._files.items()
        }

    def _count(self, tokens: int) -> int:
        """Tokens whose samples there is room for."""
        return min(MOST, max(FEWEST, SAMPLED // sum(sum(shape(site.module)) for site in self._sites)), tokens)

    def _enough(self, texts: Sequence[Item]) -> Sequence[Item]:
        """Some of many texts, evenly drawn: those beyond would only thin out what is sampled of each."""
        tokens = sum(map(len, texts))
        return texts[:: max(1, tokens // (SPARSE * self._count(tokens)))]

    def _open(self, tokens: int) -> None:
        widths = {site.name: shape(site.module) for site in self._sites}
        count = self._count(tokens)
        for number, site in enumerate(self._sites):
            outputs, inputs = widths[site.name]
            outputs, inputs = (inputs, 0) if site.lookup else (outputs, inputs)
            size = max(1, min(count, LARGEST // (outputs + inputs)))
            read = (size,) if site.lookup else (size, inputs)
            self._files[site.name] = (
                _file(self.folder / f"{number}.inputs", np.int64 if site.lookup else np.float32, read),
                _file(self.folder / f"{number}.gradients", np.float32, (size, outputs)),
            )
            self._filled[site.name] = 0

    def _batch(self, batch: Batch, tokens: int) -> None:
        draw = torch.from_numpy(self.rng.random(tuple(batch.ids.shape)))
        draw[~batch.valid] = 2.0
        with ExitStack() as stack, torch.enable_grad():
            embedding: Any = self.decoder.model.get_input_embeddings()  # type: ignore[operator]
            leaf = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
            stack.callback(leaf.remove)
            for site in self._sites:
                # Slightly too likely, and cut when the file is full: every text has its share.
                picked = draw < 1.05 * len(self._files[site.name][1]) / tokens
                stack.callback(site.module.register_forward_hook(self._hook(site, picked)).remove)
            logits, _, wanted = predictions(self.decoder, batch)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self.draws)[:, 0]
            (functional.cross_entropy(logits, drawn, reduction="none") * wanted).sum().backward()  # type: ignore[no-untyped-call]

    def _hook(self, site: Site, picked: torch.Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._inputs.setdefault(site.name, args[0])
            chosen = picked if args[0].shape[:2] == picked.shape else picked.flatten()
            inputs = args[0].detach()[chosen].numpy()
            start, room = self._filled[site.name], len(self._files[site.name][0]) - self._filled[site.name]
            count = min(room, len(inputs))
            self._files[site.name][0][start : start + count] = inputs[:count]

            def keep(gradient: torch.Tensor) -> None:
                self._files[site.name][1][start : start + count] = gradient[chosen][:count].numpy()

            output.register_hook(keep)  # type: ignore[no-untyped-call]
            self._filled[site.name] = start + count

        return hook

    def _grouped(self) -> dict[str, tuple[str, ...]]:
        """Weights that read one tensor within one module (q, k and v; gate and up), named together."""
        found: dict[tuple[int, str], list[str]] = {}
        for name, weight in self.weights.items():
            if silent := [site.name for site in weight.sites if site.name not in self._inputs]:
                raise UnsupportedModelError(
                    f"{type(self.decoder.model).__name__}: {silent[0]} read no calibration text (an expert?), "
                    "so nothing is known of its sensitivity; export this model without --precision auto"
                )
            reads: object = self._inputs[weight.sites[0].name] if len(weight.sites) == 1 else weight
            found.setdefault((id(reads), name.rpartition(".")[0]), []).append(name)
        return {joined(names): tuple(names) for names in found.values()}


def joined(names: Sequence[str]) -> str:
    """One name for several: ``layers.0.self_attn.q_proj+k_proj+v_proj``."""
    parent, _, first = names[0].rpartition(".")
    return "+".join([f"{parent}.{first}" if parent else first, *(name.rpartition(".")[2] for name in names[1:])])


def _file(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.memmap(path, dtype, "w+", shape=shape)


def shortened(items: Sequence[Item]) -> list[Item]:
    """Texts of two tokens or more, of long prompts the end."""
    return [
        Item(item.prompt[-max(1, WINDOW - len(item.answer)) :], item.answer) for item in items if len(item.prompt) > 1
    ]


def batch_tokens(decoder: Decoder) -> int:
    """Padded tokens of a batch whose logits fit into memory."""
    config: Any = decoder.model.config
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    return max(64, min(4096, LOGITS // vocabulary))


def predictions(decoder: Decoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits (N, vocab), the ids (N,) that follow, whether both sides are text (N,)) of all columns but the last."""
    output: Any = decoder.model(
        input_ids=batch.ids, attention_mask=batch.valid.long(), position_ids=batch.positions, use_cache=False
    )
    return output.logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), follows(batch).flatten()


def follows(batch: Batch) -> torch.Tensor:
    """(B, S - 1) bool: where a token and the next are text."""
    return batch.valid[:, :-1] & batch.valid[:, 1:]


class Damage:
    """What errors of one weight cost, from its samples; also what its scales and codes are fitted to."""

    def __init__(self, weight: Weight, samples: Mapping[str, Samples]) -> None:
        self.weight = weight
        self._samples = [(site, samples[site.name]) for site in weight.sites]
        self._fit: tuple[Matrix, NDArray[np.float64] | None] | None = None

    def quantized(self, form: Format) -> tuple[Quantized, float]:
        """(the weight in that format, its damage): codes that pass errors on, or nearest ones where these do better."""
        whole = np.ascontiguousarray(self.weight.matrix)
        importance, moments = self.importance()
        best = quantize(whole, form, importance)
        least = self.of(best)
        if form.is_scaled and moments is not None:
            other = quantize(whole, form, importance, moments)
            if (damage := self.of(other)) < least:
                best, least = other, damage
        return best, least

    def importance(self) -> tuple[Matrix, NDArray[np.float64] | None]:
        """((out, in) Fisher information of each weight, (in, in) second moments of inputs weighted by it).

        Without moments for a mere lookup, whose weights have nothing in common.
        """
        if self._fit is not None:
            return self._fit
        outputs, columns = self.weight.shape
        fisher: Matrix = np.zeros((outputs, columns), np.float32)
        moments: NDArray[np.float64] | None = None
        looked_up = np.zeros(columns)
        for site, samples in self._samples:
            fitting = np.arange(len(samples.gradients)) % HELD != 0 if len(samples.gradients) > HELD else slice(None)
            inputs, squared = samples.inputs[fitting], samples.gradients[fitting] ** 2
            count = max(1, len(squared))
            if site.lookup:
                added = np.zeros_like(fisher)
                np.add.at(added, inputs, squared * (site.scale**2 / count))
                fisher += added
                looked_up += added.sum(0, dtype=np.float64)
            else:
                fisher += squared.T @ inputs**2 / np.float32(count)
                moments = (inputs.T * squared.sum(1, dtype=np.float64)) @ inputs / count
        if moments is not None:
            moments = moments + np.diag(looked_up)
        self._fit = fisher, moments
        return self._fit

    def trace(self) -> float:
        """Fisher information of the whole matrix."""
        return float(self.importance()[0].sum(dtype=np.float64))

    def of(self, found: Quantized) -> float:
        """Nats per token, measured on the samples that nothing was fitted to."""
        error = found.dequantize() - self.weight.matrix
        return sum(self._at(site, samples, found, error) for site, samples in self._samples)

    def _at(self, site: Site, samples: Samples, found: Quantized, error: Matrix) -> float:
        held = slice(0, None, HELD) if len(samples.gradients) > HELD else slice(None)
        inputs, gradients = samples.inputs[held], samples.gradients[held]
        total, numbers = 0.0, found.dequantize()
        for part in _parts(len(gradients), error.shape[-1] if site.lookup else len(error)):
            if site.lookup:
                off = error[inputs[part]] * np.float32(site.scale)
            else:
                off = inputs[part] @ error.T
                if found.format.inputs is not None:
                    off += (rounded_inputs(inputs[part], found.format) - inputs[part]) @ numbers.T
            total += float(((gradients[part] * off) ** 2).sum(dtype=np.float64))
        return total / 2 / max(1, len(gradients))


def _parts(count: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, width))
    return (slice(start, start + step) for start in range(0, count, step))
