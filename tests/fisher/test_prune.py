"""fstq_infer.fisher.prune: masking dropped tokens computes what removing them computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")

import torch

from fstq_infer.fisher.gates import observe, outcome, run
from fstq_infer.fisher.hooks import Decoder, drop_bias, watch
from fstq_infer.fisher.items import Cut, Item, collate
from fstq_infer.fisher.prefix import LIMIT, Prefix
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.prune import pruned_outcome
from fstq_infer.fisher.select import keep_count, select

from .models import FAMILIES, HEADS, LAYERS, OWN_ATTENTION, WIDTH, tiny, tokens

ITEMS = [Item(tokens(n, seed=n), tokens(a, seed=a)) for n, a in ((24, 3), (9, 5), (17, 1), (30, 4), (5, 2))]
SINK, WINDOW = 1, 4


def kept(item: Item, keep: float, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).random(len(item.prompt))
    return select(scores, keep_count(len(scores), keep, SINK, WINDOW), SINK, WINDOW)


def random_probe() -> Probe:
    torch.manual_seed(1)
    probe = Probe(WIDTH, HEADS, queries=6, window=WINDOW)
    with torch.no_grad():
        probe.skip.weight.copy_(torch.randn(probe.skip.weight.shape) * 0.3)
    return probe.eval()


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


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_ATTENTION])
def test_removed_tokens_might_as_well_be_masked(family: str) -> None:
    decoder, batch = Decoder.of(tiny(family)), collate(ITEMS)
    choice = [kept(item, 0.4, seed) for seed, item in enumerate(ITEMS)]
    with watch(decoder) as seen, torch.no_grad():
        seen.bias |= dict.fromkeys(range(1, LAYERS), drop_bias(choice, batch))
        _, masked = outcome(run(decoder, batch), batch)
    found = pruned_outcome(decoder, ITEMS, (1,), lambda _stage, i, *_: choice[i])
    assert found.nll == pytest.approx(masked.tolist(), rel=1e-4)


@pytest.mark.parametrize("limit", [0, 1 << 14, LIMIT])
@pytest.mark.parametrize("family", [*FAMILIES, *OWN_ATTENTION])
def test_a_known_prefix_changes_nothing(family: str, limit: int) -> None:
    decoder, probe = Decoder.of(tiny(family)), random_probe()
    prefix, calls = Prefix(decoder, 2, limit), []
    hook = decoder.attentions[1].register_forward_hook(lambda *_: calls.append(1))

    def measured(keep: float, prefix: Prefix | None, layers: tuple[int, ...]) -> Any:
        choose = lambda _stage, i, tokens, _scores: np.intersect1d(tokens, kept(ITEMS[i], keep, i))  # noqa: E731
        return pruned_outcome(decoder, ITEMS, layers, choose, (None, probe)[: len(layers)], prefix)

    for keep, layers in ((0.8, (2,)), (0.4, (2, 3)), (0.6, (2,))):
        plain, calls[:] = measured(keep, None, layers), []
        found = measured(keep, prefix, layers)
        assert bool(calls) == (keep == 0.8 or limit != LIMIT)
        assert found.exact.tolist() == plain.exact.tolist() and found.nll.tolist() == plain.nll.tolist()
    hook.remove()
    assert all("forward" not in vars(layer) for layer in decoder.layers)


def test_a_prefix_gives_back_a_forward_of_the_layers_own() -> None:
    """As layers have it whose weights are offloaded."""
    decoder = Decoder.of(tiny())
    prefix, calls = Prefix(decoder, 1), []
    plain = decoder.layers[0].forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    decoder.layers[0].forward = own
    for _ in range(2):
        pruned_outcome(decoder, ITEMS, (1,), lambda _stage, i, *_: kept(ITEMS[i], 0.5, i), prefix=prefix)
    assert calls == [1] and vars(decoder.layers[0])["forward"] is own


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_ATTENTION])
def test_keeping_everything_is_dense(family: str) -> None:
    decoder, batch = Decoder.of(tiny(family)), collate(ITEMS)
    with torch.no_grad():
        hit, loss = outcome(run(decoder, batch), batch)
    found = pruned_outcome(decoder, ITEMS, (1,), lambda _stage, _row, tokens, _scores: tokens)
    assert found.exact.tolist() == hit.tolist() and found.nll == pytest.approx(loss.tolist(), rel=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_ATTENTION])
def test_rows_do_not_depend_on_their_batch(family: str) -> None:
    decoder = Decoder.of(tiny(family))
    found = pruned_outcome(decoder, ITEMS, (2,), lambda _stage, i, *_: kept(ITEMS[i], 0.4, i))
    for index, item in enumerate(ITEMS):
        alone = pruned_outcome(decoder, [item], (2,), lambda *_, item=item, index=index: kept(item, 0.4, index))
        assert alone.exact[0] == found.exact[index] and alone.nll[0] == pytest.approx(found.nll[index], rel=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_ATTENTION])
def test_a_later_probe_reads_what_the_earlier_stage_left(family: str) -> None:
    """Observing behind a cut and pruning in one pass give the same scores, of the tokens that are left."""
    decoder, probe = Decoder.of(tiny(family)), random_probe()
    choice = [kept(item, 0.6, seed) for seed, item in enumerate(ITEMS)]
    scores: dict[int, np.ndarray] = {}

    def choose(stage: int, row: int, tokens: Any, found: Any) -> Any:
        if stage == 0:
            return choice[row]
        np.testing.assert_array_equal(tokens, choice[row])
        scores[row] = found
        return tokens[select(found, keep_count(len(tokens), 0.5, SINK, WINDOW), SINK, WINDOW)]

    found = pruned_outcome(decoder, ITEMS, (1, 3), choose, (None, probe))
    assert [cut.layer for cut in found.cuts] == [1, 3]
    cut = Cut(1, choice)
    observed = observe(decoder, ITEMS, (3,), probe.queries, cuts=[cut], published=True)
    for row, o in enumerate(observed):
        assert o.embedding.shape == (len(choice[row]),) == o.gate[3].shape == o.surprise.shape
        assert o.window[3].shape[-1] == len(choice[row])
        with torch.no_grad():
            again = probe(ProbeInput.pad([o.inputs[3]]))[0].numpy()
        np.testing.assert_allclose(again, scores[row], rtol=2e-2, atol=2e-2)  # kept in half precision
        assert set(found.cuts[1].kept[row]) <= set(choice[row])
    first = pruned_outcome(decoder, ITEMS, (1,), lambda _stage, i, *_: choice[i])
    assert first.nll == pytest.approx([o.nll for o in observed], rel=1e-4)


def test_drop_bias() -> None:
    batch = collate([Item((5, 6, 7), (8,)), Item((9, 10), (11,))])
    bias = drop_bias([np.array([0, 2]), np.array([1])], batch)
    assert bias.shape == (2, 1, 4, 4)
    hidden = (bias[:, 0] < -1e8).tolist()
    assert hidden[0] == [[False, query != 1, False, False] for query in range(4)]
    assert hidden[1] == [[False, query != 1, False, False] for query in range(4)]
