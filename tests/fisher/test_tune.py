"""fstq_infer.fisher.tune: sampled gates, what they lose, and tuning by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.fisher.gates import observe, run
from fstq_infer.fisher.hooks import Decoder, drop_bias, watch
from fstq_infer.fisher.items import Cut, Item, collate
from fstq_infer.fisher.probe import Probe
from fstq_infer.fisher.select import keep_count, select
from fstq_infer.fisher.tune import Tuner, soft_top, tune

from .models import FAMILIES, HEADS, LAYERS, WIDTH, tiny, tokens

WINDOW, SINK = 6, 1
ITEMS = [Item(tokens(n, seed=n), tokens(a, seed=n + 50)) for n, a in ((24, 3), (9, 5), (17, 1), (30, 4))]


def random_probe(seed: int = 0) -> Probe:
    torch.manual_seed(seed)
    probe = Probe(WIDTH, HEADS, WINDOW)
    with torch.no_grad():
        for parameter in probe.skip.parameters():  # zero at first, which would hide mistakes
            parameter.normal_()
    return probe


def tuner(decoder: Decoder, layer: int, items: list[Item], cuts: list[Cut] | None = None) -> Tuner:
    cuts = cuts or []
    return Tuner(
        random_probe(), decoder, layer, items, observe(decoder, items, (layer,), WINDOW, cuts=cuts), SINK, cuts
    )


# ---- gates -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60), st.floats(0.1, 2.0), st.floats(0.1, 100.0))
def test_gates_sum_up_to_the_budget(seed: int, size: int, temperature: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, size, generator=generator) * scale
    free = torch.rand(3, size, generator=generator) < 0.7
    budget = (torch.rand(3, generator=generator) * free.sum(1)).floor().clamp(min=1).minimum(free.sum(1))
    gates = soft_top(scores, free, budget, temperature)
    assert gates.isfinite().all() and (gates <= 0).all() and (gates[~free] == 0).all()
    np.testing.assert_allclose((gates.exp() * free).sum(1).numpy(), (budget * free.any(1)).numpy(), atol=0.02)
    for row in range(3):
        mine, opened = scores[row, free[row]], gates[row, free[row]]
        assert (opened[mine.argsort()].diff() >= -1e-5).all()  # higher scores, opener gates


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_cold_gates_are_the_selection(keep: float) -> None:
    n = 60
    scores = torch.randn(1, n, generator=torch.Generator().manual_seed(2))
    column = torch.arange(n)[None]
    stay = keep_count(n, keep, SINK, WINDOW)
    free = (column >= SINK) & (column < n - WINDOW)
    gates = soft_top(scores, free, torch.tensor([stay - SINK - WINDOW]), 1e-4)
    kept = select(scores[0].numpy(), stay, SINK, WINDOW)
    assert (gates[0] > -1e-3).nonzero()[:, 0].tolist() == kept.tolist()
    assert (gates[0, np.setdiff1d(np.arange(n), kept)] < -5).all()


def test_gates_compete() -> None:
    """The sum is the budget whatever the scores, so nothing is gained by raising all of them."""
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(3), requires_grad=True)
    free = torch.ones(2, 30, dtype=torch.bool)
    total = soft_top(scores, free, torch.tensor([10, 4]), 0.5).exp().sum()
    assert torch.autograd.grad(total, scores)[0].abs().max() < 1e-5
    best = soft_top(scores, free, torch.tensor([10, 4]), 0.5)[0, 7]
    gradient = torch.autograd.grad(best, scores)[0]
    assert gradient[0, 7] > 0 and (gradient[0, np.delete(np.arange(30), 7)] < 0).all() and (gradient[1] == 0).all()


def test_gates_of_prompts_without_free_tokens() -> None:
    free = torch.zeros(2, 5, dtype=torch.bool)
    assert (soft_top(torch.randn(2, 5), free, torch.tensor([0, 0]), 0.3) == 0).all()


# ---- the loss ----------------------------------------------------------------------------------------------------


def entropy(one: Tuner) -> float:
    return sum(float(-(o.weight * o.weight.log()).sum(-1).mean()) for o in one.observations) / len(one.observations)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_cost_the_dense_cross_entropy(family: str) -> None:
    """With everything kept the loss is the entropy of the dense model's own likely tokens: nothing is lost."""
    one = tuner(Decoder.of(tiny(family)), 1, ITEMS)
    with torch.no_grad():
        found = float(one.loss(range(len(ITEMS)), [1.0] * len(ITEMS), 1e-3))
    assert found == pytest.approx(entropy(one), abs=1e-4)


def test_cold_gates_cost_what_dropping_costs() -> None:
    decoder = Decoder.of(tiny())
    one = tuner(decoder, 2, ITEMS)
    batch, rows = collate(ITEMS), range(len(ITEMS))
    kept = []
    for observation in one.observations:
        with torch.no_grad():
            scores = one.probe(observation.inputs[2].pad([observation.inputs[2]]))[0].numpy()
        kept.append(select(scores, keep_count(len(scores), 0.5, SINK, WINDOW), SINK, WINDOW))
    with torch.no_grad(), watch(decoder) as seen:
        seen.bias.update(dict.fromkeys(range(2, LAYERS), drop_bias(kept, batch)))
        logits = run(decoder, batch)
    wanted = 0.0
    for row, dense in enumerate(one.observations):
        logp = logits[row, : len(dense.likely)].log_softmax(-1).gather(1, dense.likely)
        wanted -= float((dense.weight * logp).sum(-1).mean()) / len(ITEMS)
    with torch.no_grad():
        found = float(one.loss(rows, [0.5] * len(ITEMS), 1e-4))
    assert found == pytest.approx(wanted, abs=2e-3) and abs(wanted - entropy(one)) > 0.01


def test_tuning_behind_a_stage_leaves_dropped_tokens_dropped() -> None:
    decoder, rng = Decoder.of(tiny()), np.random.default_rng(0)
    kept = [select(rng.random(len(i.prompt)), keep_count(len(i.prompt), 0.5, SINK, 4), SINK, 4) for i in ITEMS]
    one = tuner(decoder, 2, ITEMS, [Cut(1, kept)])
    with torch.no_grad():
        found = float(one.loss(range(len(ITEMS)), [1.0] * len(ITEMS), 1e-3))
    assert found == pytest.approx(entropy(one), abs=1e-4)  # open gates lose nothing of what the cut left


def test_the_answers_reach_every_part_of_the_probe() -> None:
    one = tuner(Decoder.of(tiny()), 2, ITEMS)
    loss = one.loss([0, 3], [0.5, 0.35], 0.5, torch.Generator().manual_seed(0))
    for name, gradient in zip(
        (name for name, _ in one.probe.named_parameters()),
        torch.autograd.grad(loss, list(one.probe.parameters())),
        strict=True,
    ):
        # What is added to all scores alike moves the threshold too, and changes nothing.
        assert gradient.isfinite().all() and ((gradient != 0).any() or name in ("conv3.bias", "skip.bias"))


# ---- tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_tune_lowers_its_loss_and_leaves_the_model_alone(frozen: bool) -> None:
    model = tiny().requires_grad_(not frozen)
    decoder = Decoder.of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    items = [Item(tokens(40 + n % 5, seed=n), tokens(4, seed=n + 50)) for n in range(8)]
    one = tuner(decoder, 2, items)
    rows: Any = range(len(items))

    def loss() -> float:
        with torch.no_grad():
            return float(one.loss(rows, [0.25] * len(items), 0.3))

    before, done = loss(), []
    tune(one.probe, decoder, 2, items, one.observations, SINK, seed=0, steps=80, progress=done.append)
    assert loss() < before - 0.01, (before, entropy(one))
    assert done == list(range(1, 81))
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tune_is_reproducible_and_runs_the_layers_before_once() -> None:
    decoder, calls = Decoder.of(tiny()), []
    items = [Item(tokens(20, seed=n), tokens(2, seed=n)) for n in range(5)]
    observations = observe(decoder, items, (1,), WINDOW)
    hook = decoder.attentions[0].register_forward_hook(lambda *_: calls.append(1))
    found = []
    for _ in range(2):
        probe = random_probe()
        tune(probe, decoder, 1, items, observations, SINK, seed=6, steps=4)
        found.append(torch.cat([p.detach().flatten() for p in probe.parameters()]))
    hook.remove()
    assert torch.equal(*found) and len(calls) == 2  # all items fit into one step
    assert not torch.equal(found[0], torch.cat([p.detach().flatten() for p in random_probe().parameters()]))
