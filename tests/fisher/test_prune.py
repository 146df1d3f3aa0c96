"""fstq_infer.fisher.prune: masking dropped tokens computes what removing them computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")

import torch

from fstq_infer.fisher.gates import outcome, run
from fstq_infer.fisher.hooks import Decoder, drop_bias, watch
from fstq_infer.fisher.items import Item, collate
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.select import keep_count, select

from .models import FAMILIES, LAYERS, tiny, tokens

ITEMS = [Item(tokens(n, seed=n), tokens(a, seed=a)) for n, a in ((24, 3), (9, 5), (17, 1), (30, 4), (5, 2))]
SINK, WINDOW = 1, 4


def kept(item: Item, keep: float, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).random(len(item.prompt))
    return select(scores, keep_count(len(scores), keep, SINK, WINDOW), SINK, WINDOW)


def removed(model: Any, item: Item, layer: int, columns: Sequence[int]) -> Any:
    """Logits (A, vocab) at the answer when all but ``columns`` of the prompt leave before ``layer``; Llama, by hand."""
    ids = torch.tensor([item.prompt + item.answer])
    positions = torch.arange(ids.shape[1])[None]

    def layers(hidden: Any, positions: Any, low: int, high: int) -> Any:
        causal = torch.full((hidden.shape[1],) * 2, -1e9).triu(1)[None, None]
        rotary = model.model.rotary_emb(hidden, positions)
        for block in model.model.layers[low:high]:
            out = block(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    hidden = layers(model.model.embed_tokens(ids), positions, 0, layer)
    stay = torch.tensor([*columns, *range(len(item.prompt), ids.shape[1])])
    hidden = layers(hidden[:, stay], positions[:, stay], layer, LAYERS)
    return model.lm_head(model.model.norm(hidden))[0, -len(item.answer) - 1 : -1]


@pytest.mark.parametrize("keep", [0.6, 0.25])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_masking_equals_removing(layer: int, keep: float) -> None:
    model = tiny()
    decoder, batch = Decoder.of(model), collate(ITEMS)
    choice = [kept(item, keep, seed) for seed, item in enumerate(ITEMS)]
    with torch.no_grad(), watch(decoder) as seen:
        seen.bias.update(dict.fromkeys(range(layer, LAYERS), drop_bias(choice, batch)))
        masked = run(decoder, batch)
    found = pruned_outcome(decoder, ITEMS, (layer,), lambda _stage, i, *_: choice[i])
    assert all(np.array_equal(a, b) for a, b in zip(found.cuts[0].kept, choice, strict=True))
    with torch.no_grad():
        dense = run(decoder, batch)
    for row, item in enumerate(ITEMS):
        with torch.no_grad():
            wanted = removed(model, item, layer, choice[row].tolist())
        answer = torch.tensor(item.answer)
        torch.testing.assert_close(masked[row, : len(answer)], wanted, rtol=1e-4, atol=1e-4)
        assert found.nll[row] == pytest.approx(float(torch.nn.functional.cross_entropy(wanted, answer)), rel=1e-4)
        assert found.exact[row] == bool((wanted.argmax(-1) == answer).all())
        if len(choice[row]) < len(item.prompt):
            assert not torch.allclose(masked[row, : len(answer)], dense[row, : len(answer)], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_dense(family: str) -> None:
    decoder, batch = Decoder.of(tiny(family)), collate(ITEMS)
    with torch.no_grad():
        hit, loss = outcome(run(decoder, batch), batch)
    found = pruned_outcome(decoder, ITEMS, (1,), lambda _stage, _row, tokens, _scores: tokens)
    assert found.exact.tolist() == hit.tolist() and found.nll == pytest.approx(loss.tolist(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_their_batch(family: str) -> None:
    decoder = Decoder.of(tiny(family))
    found = pruned_outcome(decoder, ITEMS, (2,), lambda _stage, i, *_: kept(ITEMS[i], 0.4, i))
    for index, item in enumerate(ITEMS):
        alone = pruned_outcome(decoder, [item], (2,), lambda *_, item=item, index=index: kept(item, 0.4, index))
        assert alone.exact[0] == found.exact[index] and alone.nll[0] == pytest.approx(found.nll[index], rel=1e-4)


def test_drop_bias() -> None:
    batch = collate([Item((5, 6, 7), (8,)), Item((9, 10), (11,))])
    bias = drop_bias([np.array([0, 2]), np.array([1])], batch)
    assert bias.shape == (2, 1, 4, 4)
    hidden = (bias[:, 0] < -1e8).tolist()
    assert hidden[0] == [[False, query != 1, False, False] for query in range(4)]
    assert hidden[1] == [[False, query != 1, False, False] for query in range(4)]
