"""fstq_infer.fisher.gates and hooks: sensitivities against finite differences, batches, families, no traces left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("transformers", reason="transformers is not installed; it comes with the 'export' extra")

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fstq_infer.errors import UnsupportedModelError
from fstq_infer.fisher import gates
from fstq_infer.fisher.gates import average_rotation, future_heads, observe, outcome, run
from fstq_infer.fisher.hooks import Decoder, causal_bias, heads, watch
from fstq_infer.fisher.items import Item, batches, collate
from fstq_infer.fisher.scores import BASELINES, SCORES, computable

from .models import FAMILIES, HEADS, LAYERS, VOCABULARY, WIDTH, tiny, tokens

STEP = 1e-2  # norms and softmax are in single precision even in a model of doubles
ITEM = Item(tokens(14, seed=1), tokens(3, seed=2))
ITEMS = [Item(tokens(n, seed=n), tokens(a, seed=a)) for n, a in ((14, 3), (5, 4), (9, 1), (1, 2), (20, 2))]


@pytest.fixture(scope="module")
def llama() -> Decoder:
    """A Llama in double precision, for finite differences."""
    return Decoder.of(tiny().double())


def margin(logits: Any, item: Item) -> Any:
    """(B,) sum over the answer of (logit minus mean logit); logits (B, S, vocab) of prompt and answer."""
    start = len(item.prompt) - 1
    rows = logits[:, start : start + len(item.answer)]
    picked = rows.gather(2, torch.tensor(item.answer).expand(len(rows), -1)[..., None])[..., 0]
    return (picked - rows.mean(-1)).sum(1)


def gated_margin(decoder: Decoder, item: Item, layers: range, gates: Any) -> Any:
    """(B,) margins; gates (B, S): log m of each prompt token, added for every query but its own in ``layers``."""
    ids = torch.tensor([item.prompt + item.answer])
    bias = torch.zeros(len(gates), 1, ids.shape[1], ids.shape[1], dtype=gates.dtype)
    bias[:, 0, :, : len(item.prompt)] = gates[:, None]
    bias = bias.masked_fill(torch.eye(ids.shape[1], dtype=torch.bool), 0.0)
    with watch(decoder) as seen:
        seen.bias.update(dict.fromkeys(layers, bias))
        return margin(decoder.model(input_ids=ids.expand(len(gates), -1), use_cache=False).logits, item)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gate_score_is_the_squared_finite_difference(llama: Decoder, layer: int) -> None:
    score = observe(llama, [ITEM], (1,), 4)[0].gate[layer].double()
    step = STEP
    shifts = torch.eye(len(ITEM.prompt), dtype=torch.float64) * step
    layers = range(layer, LAYERS)
    with torch.no_grad():
        up, down = (gated_margin(llama, ITEM, layers, shifts * sign) for sign in (1, -1))
    wanted = ((up - down) / (2 * step)) ** 2
    assert (wanted > 1e-6).sum() > 10
    torch.testing.assert_close(score, wanted, rtol=2e-3, atol=1e-5)


def test_gate_score_of_a_layer_gates_all_layers_from_it_on(llama: Decoder) -> None:
    """Row l is the squared sum of the single-layer gradients from l on, as of one gate shared by these layers."""
    score = observe(llama, [ITEM], (2,), 4)[0].gate.double()
    assert score.shape == (LAYERS, len(ITEM.prompt))

    def gradient(layers: range) -> Any:
        gates = torch.zeros(1, len(ITEM.prompt), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(gated_margin(llama, ITEM, layers, gates).sum(), gates)[0][0]

    single = torch.stack([gradient(range(layer, layer + 1)) for layer in range(LAYERS)])
    for layer in range(LAYERS):
        torch.testing.assert_close(score[layer], single[layer:].sum(0) ** 2, rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(score[layer], gradient(range(layer, LAYERS)) ** 2, rtol=1e-4, atol=1e-10)


def test_gate_of_layer_zero_is_a_mask_of_the_model_itself(llama: Decoder) -> None:
    """Without any hook of ours: Transformers takes an additive mask (1, 1, S, S) for all layers."""
    size, step = len(ITEM), STEP
    ids = torch.tensor([ITEM.prompt + ITEM.answer])
    causal = torch.full((size, size), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    score = observe(llama, [ITEM], (1,), 4)[0].gate[0].double()
    for token in (0, 6, len(ITEM.prompt) - 1):
        found = []
        for sign in (1, -1):
            mask = causal.clone()
            mask[token + 1 :, token] += sign * step
            with torch.no_grad():
                found.append(margin(llama.model(input_ids=ids, attention_mask=mask[None, None]).logits, ITEM)[0])
        torch.testing.assert_close(score[token], ((found[0] - found[1]) / (2 * step)) ** 2, rtol=2e-3, atol=1e-5)


def test_embedding_score_is_the_squared_norm_of_finite_differences(llama: Decoder) -> None:
    score = observe(llama, [ITEM], (1,), 4)[0].embedding.double()
    embedded = llama.model.get_input_embeddings()(torch.tensor([ITEM.prompt + ITEM.answer]))
    step = STEP
    for token in (0, 5, 13):
        shifts = torch.zeros(WIDTH, *embedded.shape[1:], dtype=torch.float64)
        shifts[:, token] = torch.eye(WIDTH, dtype=torch.float64) * step
        with torch.no_grad():
            up, down = (margin(llama.model(inputs_embeds=embedded + s).logits, ITEM) for s in (shifts, -shifts))
        wanted = (((up - down) / (2 * step)) ** 2).sum()
        assert wanted > 1e-6
        torch.testing.assert_close(score[token], wanted, rtol=2e-3, atol=1e-5)


def test_a_token_that_no_other_sees_has_no_gate_score() -> None:
    """The last layer's gates act on the answer's queries only: nothing else reaches the logits from there."""
    item = Item(ITEM.prompt, ITEM.answer[:1])  # the last prompt token alone predicts; it is no other query's key
    gate = observe(Decoder.of(tiny()), [item], (1,), 4)[0].gate
    assert gate[LAYERS - 1, -1] == 0 and (gate[LAYERS - 1, :-1] > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_with_padding_equals_single_runs(family: str) -> None:
    decoder = Decoder.of(tiny(family))
    together = observe(decoder, ITEMS, (1, 3), 6)
    for item, row in zip(ITEMS, together, strict=True):
        (alone,) = observe(decoder, [item], (1, 3), 6)
        assert row.exact == alone.exact and row.nll == pytest.approx(alone.nll, rel=1e-4)
        close(row.gate, alone.gate)
        close(row.embedding, alone.embedding)
        close(row.weight, alone.weight)
        for layer in (1, 3):
            close(row.window[layer], alone.window[layer], 2e-3)
            close(row.inputs[layer].states, alone.inputs[layer].states, 5e-3)
            close(row.inputs[layer].side, alone.inputs[layer].side, 2e-2)


def close(found: Any, wanted: Any, tolerance: float = 1e-3) -> None:
    """Equal within ``tolerance`` of the largest value."""
    found, wanted = found.float(), wanted.float()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-12


@pytest.fixture(scope="module")
def seen() -> Any:
    """family -> its observations of all items, in one batch and one by one."""
    found: dict[str, Any] = {}

    def of(family: str) -> Any:
        if family not in found:
            decoder = Decoder.of(tiny(family))
            alone = [observe(decoder, [item], (2,), 6, published=True)[0] for item in ITEMS]
            found[family] = observe(decoder, ITEMS, (2,), 6, published=True), alone
        return found[family]

    return of


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_padding(seen: Any, family: str, name: str) -> None:
    for item, row, alone in zip(ITEMS, *seen(family), strict=True):
        together, single = (SCORES[name](o.evidence(2, o.embedding.numpy())) for o in (row, alone))
        assert together.shape == (len(item.prompt),) and np.isfinite(together).all()
        half = name in ("last-token", "window")  # kept in half precision
        np.testing.assert_allclose(together, single, rtol=1e-3 if half else 1e-4, atol=1e-4 * abs(single).max())
        assert name in ("random", "recency") or len(item.prompt) < 14 or np.ptp(together) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_own_attention_and_surprise_are_those_of_the_model(
    family: str, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    monkeypatch.setattr(gates, "HEAD_TOKENS", 12)
    chunked = observe(Decoder.of(model), ITEMS, (2,), 6, published=True)
    for item, row, other in zip(ITEMS, seen(family)[0], chunked, strict=True):
        ids = torch.tensor([item.prompt])
        output = model(input_ids=ids, output_attentions=True)
        close(row.own[2], output.attentions[2][0, :, -6:].mean((0, 1)), 1e-4)
        nll = -output.logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        for found in (row.surprise, other.surprise):
            torch.testing.assert_close(found, torch.cat([torch.zeros(1), nll]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_those_that_attention_is_made_of(family: str) -> None:
    model, batch = tiny(family), collate(ITEMS[:1])
    decoder = Decoder.of(model)
    with torch.no_grad(), watch(decoder, attention=(2,), calls=(2,)) as seen:
        run(decoder, batch)
    with torch.no_grad():
        h = heads(decoder.attentions[2], seen.calls[2])
    assert h is not None and h.query.shape[:3] == (1, HEADS, len(ITEMS[0]))
    logits = h.query @ h.key.repeat_interleave(HEADS // h.key.shape[1], 1).transpose(2, 3) * h.scale
    cap = getattr(model.config, "attn_logit_softcapping", None)
    logits = logits if cap is None else cap * (logits / cap).tanh()
    size = logits.shape[-1]
    masked = logits.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf)
    close(masked[:, :, :8].softmax(-1), seen.attention[2][:, :, :8], 1e-4)  # before Gemma 2's sliding window closes
    close(observe(decoder, ITEMS[:1], (2,), 6, published=True)[0].key_norm[2], h.key[0, :, :14].norm(dim=-1).mean(0))


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_future_queries_are_the_mean_over_future_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(family), collate(ITEMS)
    decoder = Decoder.of(model)
    monkeypatch.setattr(gates, "AHEAD", 40)
    with torch.no_grad(), watch(decoder, calls=(2,)) as seen:
        run(decoder, batch)
    call = seen.calls[2]
    with torch.no_grad():
        found = future_heads(decoder.attentions[2], call, batch)
        queries = []
        for step in range(40):
            ahead = (batch.prompt_valid.sum(1, keepdim=True) + step).expand(batch.ids.shape)
            rotary = model.model.rotary_emb(call[1]["hidden_states"], ahead)
            queries.append(heads(decoder.attentions[2], call, position_embeddings=rotary).query)
    assert found is not None
    close(found.query, torch.stack(queries).mean(0), 1e-4)


def test_average_rotation_keeps_the_scale() -> None:
    """Some rotary embeddings (YaRN) scale their cosines and sines."""
    batch, angles = collate([Item((5, 6, 7), (8,))]), torch.tensor([0.5, 0.0])
    turned = torch.arange(4)[:, None] * angles
    cos, sin = average_rotation(1.5 * turned.cos()[None], 1.5 * turned.sin()[None], batch)
    ahead = torch.arange(3, 3 + gates.AHEAD)[:, None] * angles
    torch.testing.assert_close(cos[0], 1.5 * ahead.cos().mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sin[0], 1.5 * ahead.sin().mean(0), rtol=1e-3, atol=1e-4)


def test_a_family_without_the_attention_interface_lacks_what_reads_keys() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=HEADS, attention_types=[[["global"], 2]]
    )
    config._attn_implementation = "eager"
    decoder = Decoder.of(transformers.GPTNeoForCausalLM(config).eval().requires_grad_(False))
    (row,) = observe(decoder, ITEMS[:1], (1,), 4, published=True)
    assert set(BASELINES) - set(computable(BASELINES, row.evidence(1))) == {"key-norm", "expected-attention"}


@pytest.mark.parametrize("score", ["gate", "embedding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, score: str) -> None:
    for item, seen in zip(ITEMS, observe(Decoder.of(tiny(family)), ITEMS, (1,), 6), strict=True):
        size, answer = len(item.prompt), len(item.answer)
        found = getattr(seen, score)
        assert found.shape == ((LAYERS, size) if score == "gate" else (size,))
        assert found.isfinite().all() and (found >= 0).all()
        assert (found > 0).any()
        assert seen.window[1].shape == (HEADS, min(6, size), size)
        assert seen.likely.shape == seen.weight.shape == (answer, VOCABULARY)
        assert torch.allclose(seen.weight.sum(1), torch.ones(answer), atol=1e-4)
        assert torch.allclose(seen.window[1].float().sum(-1), torch.ones(HEADS, min(6, size)), atol=1e-2)


def test_exact_and_nll_are_those_of_the_logits() -> None:
    decoder = Decoder.of(tiny())
    greedy = list(ITEM.prompt)
    for _ in range(3):
        greedy.append(int(decoder.model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    right = Item(ITEM.prompt, tuple(greedy[-3:]))
    almost = Item(ITEM.prompt, (*greedy[-3:-1], (greedy[-1] + 1) % VOCABULARY))
    for item, exact in ((right, True), (almost, False)):
        seen = observe(decoder, [item, *ITEMS], (1,), 4)[0]
        logp = decoder.model(input_ids=torch.tensor([item.prompt + item.answer])).logits[0].log_softmax(-1)
        wanted = -sum(float(logp[len(item.prompt) - 1 + i, token]) for i, token in enumerate(item.answer)) / 3
        assert seen.exact == exact and seen.nll == pytest.approx(wanted, rel=1e-4)
        assert [int(row[0]) for row in seen.likely[:2]] == greedy[-3:-1]


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_leave_no_trace(family: str) -> None:
    model = tiny(family)
    decoder, batch = Decoder.of(model), collate(ITEMS)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = run(decoder, batch)
        with watch(decoder, hidden=(0, 2), attention=(1,)) as seen:
            seen.bias[1] = torch.full((1, 1, batch.ids.shape[1], batch.ids.shape[1]), -2.0).tril(-1)
            assert hooks_of(model) == LAYERS + 3
            assert not torch.equal(run(decoder, batch), before)
            assert set(seen.hidden) == {0, 2} and set(seen.attention) == {1}
        with pytest.raises(ZeroDivisionError), watch(decoder, hidden=(0,)):
            raise ZeroDivisionError
    observe(decoder, ITEMS, (1, 2), 4, published=True)
    assert hooks_of(model) == 0 and "eager" not in ALL_ATTENTION_FUNCTIONS
    assert torch.equal(run(decoder, batch), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_bias_set_within_the_pass_acts_from_its_layer_on() -> None:
    decoder, batch = Decoder.of(tiny()), collate(ITEMS)
    bias = torch.full((1, 1, batch.ids.shape[1], batch.ids.shape[1]), -3.0).tril(-1)
    with torch.no_grad():
        with watch(decoder, before={2: lambda seen: seen.bias.update({2: bias, 3: bias})}):
            within = run(decoder, batch)
        with watch(decoder) as seen:
            seen.bias.update({2: bias, 3: bias})
            assert torch.equal(run(decoder, batch), within)


def test_boolean_and_missing_masks_become_additive() -> None:
    hidden = torch.zeros(1, 3, 4)
    lowest = torch.finfo(torch.float32).min
    wanted = torch.tensor([[0, lowest, lowest], [0, 0, lowest], [0, 0, 0]])[None, None]
    assert torch.equal(causal_bias(None, hidden), wanted)
    assert torch.equal(causal_bias(wanted == 0, hidden), wanted)
    assert causal_bias(wanted, hidden) is wanted


def test_models_that_cannot_be_watched_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear"):
        Decoder.of(torch.nn.Linear(2, 2))
    bare = torch.nn.Module()
    bare.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModelError, match="layer 0 has no attention"):
        Decoder.of(bare)
    model = tiny()
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="eager"), watch(Decoder.of(model), attention=(1,)):
        model(input_ids=torch.tensor([ITEM.prompt]))
    assert hooks_of(model) == 0


def test_collate() -> None:
    batch = collate([Item((5, 6, 7), (8,)), Item((9,), (10, 11))])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0], [0, 0, 9, 10, 11]]
    assert batch.valid.tolist() == [[True] * 4 + [False], [False] * 2 + [True] * 3]
    assert batch.prompt == 3 and batch.labels.tolist() == [[8, 0], [10, 11]]
    assert batch.prompt_valid.tolist() == [[True] * 3, [False, False, True]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    hit, nll = outcome(torch.eye(20)[torch.tensor([[8, 3], [10, 4]])] * 50, batch)
    assert hit.tolist() == [True, False] and nll.tolist() == pytest.approx([0, 25], abs=1e-4)


def test_batches_cover_every_item_once_within_bounds() -> None:
    items = [Item((2,) * n, (3,) * a) for n in (1, 7, 30, 90) for a in (1, 8, 40) for _ in range(5)]
    found = list(batches(items, tokens=256, at_most=6))
    assert sorted(i for indices, _ in found for i in indices) == list(range(len(items)))
    for indices, batch in found:
        assert batch.ids.numel() <= 256 and len(indices) == len(batch.ids) <= 6
        for row, index in enumerate(indices):
            assert batch.ids[row, batch.valid[row]].tolist() == [*items[index].prompt, *items[index].answer]
    crossed = [Item((2,) * n, (3,) * (41 - n)) for n in (1, 40) * 6]  # as long as each other, but not when padded
    assert all(batch.ids.numel() <= 256 for _, batch in batches(crossed, tokens=256))
    (only,) = batches([Item((2,) * 300, (3,))], tokens=256)
    assert only[0] == [0]
