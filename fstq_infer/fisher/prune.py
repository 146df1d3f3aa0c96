"""The reference for pruning in torch: tokens leave before a decoder layer of any Hugging Face model, through hooks.

Calibration measures with it, verification compares the exported graph with it. What is computed equals masking the
dropped tokens as keys in every layer from the prune layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fstq_infer.errors import UnsupportedModelError
from fstq_infer.fisher.gates import Present, features, outcome, run
from fstq_infer.fisher.hooks import NEVER, Decoder, Seen, causal_bias, watch
from fstq_infer.fisher.items import Batch, Cut, Item, batches
from fstq_infer.fisher.prefix import Prefix
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

    The first entry holds all tokens, entry n what stays after stage n, once the pass is over. Raises
    UnsupportedModelError for a model whose layers read something else by token than hidden states, masks and positions.
    """
    kept: list[list[Int64]] = [[np.arange(n) for n in batch.lengths]]
    scores = [np.zeros(0, np.float32)] * len(kept[0])
    scored = [layer for layer, probe in zip(layers, probes, strict=True) if probe is not None]
    present = Present.of(batch)
    left = _Left(batch)

    def stage(number: int) -> Callable[[Seen], None]:
        def apply(seen: Seen) -> None:
            nonlocal present
            layer, probe, there = layers[number], probes[number], kept[number]
            if probe is not None:
                now = present.alone if number else present
                found = probe(features(seen, layer, batch, present, probe.queries, now)).float().numpy()
                scores[:] = [row[valid] for row, valid in zip(found, now.valid.numpy(), strict=True)]
            stay = [choose(number, row, *known) for row, known in enumerate(zip(there, scores, strict=True))]
            kept.append(stay)
            if len(scores[0]):
                parts = zip(scores, there, stay, strict=True)
                scores[:] = [own[np.isin(tokens, left)] for own, tokens, left in parts]
            present = Present.of(batch, stay)
            left.only(present)

        return apply

    before = {layer: stage(number) for number, layer in enumerate(layers)}
    looks = tuple(layer - 1 for layer in scored)
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(watch(decoder, hidden=(0, *scored) if scored else (), attention=looks, before=before))
        for layer in layers:  # after the hooks of watch, which call ``before``
            hook = decoder.layers[layer].register_forward_pre_hook(left.take, with_kwargs=True)
            stack.callback(hook.remove)
        for module in decoder.attentions[min(layers, default=len(decoder.layers)) :]:
            hook = module.register_forward_pre_hook(left.narrow, with_kwargs=True)
            stack.callback(hook.remove)
            for owner, name, mask in _own_masks(module):
                stack.callback(setattr, owner, name, mask)
                stack.callback(owner.register_forward_pre_hook(left.narrow_own(name, mask)).remove)
        stack.callback(decoder.layers[-1].register_forward_hook(left.put_back).remove)
        yield kept


class _Left:
    """The columns of a batch that are still there, and the hooks that leave out all others."""

    def __init__(self, batch: Batch) -> None:
        rows, self.total = batch.ids.shape
        self.answers = torch.arange(batch.prompt, self.total).expand(rows, -1)
        self.before = self.columns = torch.arange(self.total).expand(rows, -1)
        self.valid = batch.valid

    def only(self, present: Present) -> None:
        """These tokens of the prompts, and the answers."""
        self.before = self.columns
        self.columns = torch.cat([present.columns, self.answers], 1)
        self.valid = torch.cat([present.valid, torch.ones_like(self.answers, dtype=torch.bool)], 1)

    def take(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """At a prune layer: the hidden states of those that stay."""
        states = args[0] if args else kwargs["hidden_states"]
        places = torch.searchsorted(self.before.contiguous(), self.columns.contiguous())
        states = _rows(states, places)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def put_back(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """After the last layer: states in their columns again, zeros in all others. Some models count on the shape."""
        states = output[0] if isinstance(output, tuple) else output
        whole = states.new_zeros(len(states), self.total, states.shape[-1])
        rows, places = self.valid.nonzero(as_tuple=True)
        whole[rows, self.columns[rows, places]] = states[rows, places]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """At an attention module: masks and positions of those that stay; padding is nobody's key but its own."""
        states = args[0] if args else kwargs["hidden_states"]
        columns, changed = self.columns, dict(kwargs)
        mask = causal_bias(kwargs.get("attention_mask"), states.new_empty(1, self.total)).expand(
            len(states), -1, -1, -1
        )
        mask = _rows(_rows(mask.transpose(1, 2), columns).permute(0, 3, 1, 2), columns).permute(0, 3, 2, 1)
        hidden = ~self.valid[:, None] & ~torch.eye(columns.shape[1], dtype=torch.bool)
        changed["attention_mask"] = mask.masked_fill(hidden[:, None], NEVER)
        for name, value in kwargs.items():
            if name == "position_embeddings" and isinstance(value, tuple):
                changed[name] = tuple(_rows(part.expand(len(states), *part.shape[1:]), columns) for part in value)
            elif name == "position_ids" and isinstance(value, torch.Tensor):
                changed[name] = _rows(value.expand(len(states), -1), columns)
            elif name not in ("attention_mask", "hidden_states", "cache_position") and self.total in getattr(
                value, "shape", ()
            ):
                raise UnsupportedModelError(
                    f"{type(module).__name__} reads {name} {tuple(value.shape)} for each token; token pruning knows "
                    "hidden states, attention masks and positions. Export the model without --calib"
                )
        return args, changed

    def narrow_own(self, name: str, mask: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook that sets a module's buffer to the rows and columns of its (1, 1, P, P) mask that stay."""

        def hook(module: nn.Module, _args: tuple[Any, ...]) -> None:
            setattr(module, name, mask[0, 0][self.columns[:, :, None], self.columns[:, None, :]][:, None])

        return hook


def _own_masks(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """(module, name, mask) of masks by query and key that an attention holds itself, as GPT-Neo does its bands."""
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if buffer.dtype == torch.bool and buffer.ndim == 4 and buffer.shape[:2] == (1, 1)
    ]


def _rows(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, S, ...) -> (B, K, ...)."""
    return values[torch.arange(len(values))[:, None], columns]


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
    prefix: Prefix | None = None,
) -> Pruned:
    """All items, pruned before each of ``layers``; for ``choose`` a row is an index into ``items``.

    prefix: of the first of ``layers``, where no probe may run; what it knows is not computed again.
    """
    exact, nll = np.zeros(len(items), bool), np.zeros(len(items))
    kept_by_stage = [[np.zeros(0, np.int64)] * len(items) for _ in layers]
    for indices, batch in batches(items):

        def row_of(
            stage: int, row: int, tokens: Int64, scores: NDArray[np.float32], at: Sequence[int] = indices
        ) -> Int64:
            return choose(stage, at[row], tokens, scores)

        with torch.no_grad(), ExitStack() as stack:
            if prefix is not None:
                stack.enter_context(prefix.ahead(batch))
            kept = stack.enter_context(pruning(decoder, batch, layers, row_of, probes or [None] * len(layers)))
            hit, loss = outcome(run(decoder, batch), batch)
        exact[indices], nll[indices] = hit.numpy(), loss.double().numpy()
        for found, left in zip(kept_by_stage, kept[1:], strict=True):
            for index, tokens in zip(indices, left, strict=True):
                found[index] = tokens
    return Pruned(exact, nll, tuple(map(Cut, layers, kept_by_stage)))
