"""fstq_infer.fisher.probe and train: features, the probe's invariances, distillation, soft gates and tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")

import torch

from fstq_infer.fisher import train
from fstq_infer.fisher.gates import observe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item, collate
from fstq_infer.fisher.probe import EPSILON, Probe, ProbeInput, lexical
from fstq_infer.fisher.select import keep_count, select

from .models import HEADS, LAYERS, WIDTH, tiny, tokens

WINDOW = 6
LENGTHS = (31, 4, 12, 6, 1, 20)


def random_probe(seed: int = 0, span: int = 1) -> Probe:
    torch.manual_seed(seed)
    probe = Probe(WIDTH, HEADS, WINDOW, span=span)
    with torch.no_grad():
        for parameter in probe.skip.parameters():  # zero at first, which would hide mistakes
            parameter.normal_()
    return probe


def random_rows(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[ProbeInput]:
    """Inputs of the shape that :meth:`ProbeInput.row` gives."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 * HEADS + 3
    return [
        ProbeInput(
            torch.randn(n, 2 * WIDTH, generator=generator).half(),
            torch.randn(side, n, generator=generator).half(),
            torch.ones(n, dtype=torch.bool),
            torch.arange(n) >= n - WINDOW,
        )
        for n in lengths
    ]


# ---- features ----------------------------------------------------------------------------------------------------


def test_features_do_not_depend_on_padding() -> None:
    """Rows of a left-padded batch, with anything in the padding, give the features that they give alone."""
    generator = torch.Generator().manual_seed(3)
    size = max(LENGTHS)
    hidden, embedded = (torch.randn(len(LENGTHS), size, WIDTH, generator=generator) for _ in range(2))
    ids = torch.randint(0, 5, (len(LENGTHS), size), generator=generator)
    valid = torch.arange(size) >= size - torch.tensor(LENGTHS)[:, None]
    attention = torch.rand(len(LENGTHS), HEADS, WINDOW, size, generator=generator)
    attention *= valid[:, None, None] | ~valid[:, None, -WINDOW:, None]  # real queries see no padding
    together = ProbeInput.of(hidden, embedded, attention, ids, valid)
    assert together.states.shape == (len(LENGTHS), size, 2 * WIDTH) and together.side.shape[1] == 2 * HEADS + 3
    for row, n in enumerate(LENGTHS):
        shown = attention[row : row + 1, :, -min(n, WINDOW) :, -n:]
        part = [x[row : row + 1, -n:] for x in (hidden, embedded)]
        alone = ProbeInput.of(part[0], part[1], shown, ids[row : row + 1, -n:], valid[row : row + 1, -n:])
        torch.testing.assert_close(together.states[row : row + 1, -n:], alone.states)
        torch.testing.assert_close(together.side[row : row + 1, :, -n:], alone.side)
        kept = together.row(row)
        assert kept.states.dtype == torch.float16 and kept.valid.tolist() == [True] * n
        torch.testing.assert_close(kept.side.float(), alone.side[0], rtol=1e-3, atol=1e-3)


def test_behind_a_stage_only_what_is_left_of_the_question_is_read_as_such() -> None:
    """Tokens before it that moved up among the last ones match it like any other, and ask nothing."""
    generator = torch.Generator().manual_seed(4)
    n, left = 20, 3
    hidden, embedded = (torch.randn(1, n, WIDTH, generator=generator) for _ in range(2))
    attention = torch.rand(1, HEADS, WINDOW, n, generator=generator)
    ids, valid = torch.randint(0, 5, (1, n), generator=generator), torch.ones(1, n, dtype=torch.bool)
    x = ProbeInput.of(hidden, embedded, attention, ids, valid, torch.arange(n)[None] >= n - left)
    short = ProbeInput.of(hidden, embedded, attention[:, :, -left:], ids, valid)
    torch.testing.assert_close(x.side, short.side)
    torch.testing.assert_close(random_probe()(x), random_probe()(short))


def naive_lexical(ids: list[int], window: int) -> list[list[float]]:
    start = max(0, len(ids) - window)

    def matched(key: int, length: int) -> bool:
        """Whether the n-gram that ends at ``key`` occurs, whole, within the window."""
        mine = ids[key - length + 1 : key + 1]
        ends = range(start + length - 1, len(ids))
        return key - length + 1 >= 0 and any(ids[end - length + 1 : end + 1] == mine for end in ends)

    rows = [[matched(key, n) and key < start for key in range(len(ids))] for n in (1, 2, 3)]
    return [[hit / ids.count(token) for hit, token in zip(rows[0], ids, strict=True)], *map(list, rows[1:])]


def test_lexical_is_the_naive_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 6, 7, 30, 60):
        ids = torch.randint(0, 4, (1, n), generator=generator)
        valid, asked = torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None] >= n - WINDOW
        found = lexical(ids, valid, asked, min(WINDOW, n))
        np.testing.assert_allclose(found[0].numpy(), np.array(naive_lexical(ids[0].tolist(), WINDOW), float), rtol=1e-6)


# ---- the probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [1, 5])
def test_scores_do_not_depend_on_padding(span: int) -> None:
    probe, rows = random_probe(span=span), random_rows()
    with torch.no_grad():
        together = probe(ProbeInput.pad(rows))
        for row, n in enumerate(LENGTHS):
            alone = probe(ProbeInput.pad([rows[row]]))
            assert alone.shape == (1, n) and alone.isfinite().all()
            torch.testing.assert_close(together[row, -n:], alone[0], rtol=1e-4, atol=1e-4)


def test_a_span_sums_what_neighbours_are_above_the_mean() -> None:
    probe, x = random_probe(), ProbeInput.pad(random_rows(lengths=(31,)))
    with torch.no_grad():
        plain, summed = probe(x)[0].numpy(), probe.with_span(5)(x)[0].numpy()
    above = plain[:-WINDOW] - plain[:-WINDOW].mean()
    wanted = [above[max(0, i - 2) : i + 3].sum() for i in range(31 - WINDOW)]
    np.testing.assert_allclose(summed[:-WINDOW], wanted, rtol=1e-4, atol=1e-4)
    assert probe.with_span(5).with_span(1)(x)[0].tolist() == pytest.approx(plain.tolist())


@pytest.mark.parametrize("span", [1, 9])
def test_arrays_round_trip(span: int) -> None:
    probe, x = random_probe(span=span), ProbeInput.pad(random_rows())
    arrays = probe.arrays()
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert arrays["query.weight"].shape == (probe.heads, probe.rank, 2 * WIDTH)
    assert arrays["key.bias"].shape == (probe.heads, probe.rank)
    again = Probe.from_arrays(arrays, WINDOW)
    with torch.no_grad():
        assert again.window == WINDOW and torch.equal(again(x), probe(x))
        before = {name: array.copy() for name, array in arrays.items()}
        for parameter in (*probe.parameters(), *again.parameters()):
            parameter.add_(1)
    assert all((arrays[name] == before[name]).all() for name in arrays)  # a copy: later training changes nothing


def test_untrained_probe_is_the_mean_log_window_attention() -> None:
    decoder = Decoder.of(tiny())
    seen = observe(decoder, [Item(tokens(25, seed=1), tokens(2, seed=2))], (2,), WINDOW)[0]
    probe = Probe.untrained(WIDTH, HEADS, WINDOW)
    with torch.no_grad():
        scores = probe(ProbeInput.pad([seen.inputs[2]]))[0]
    wanted = (seen.window[2].float().mean(1) + EPSILON).log().mean(0)
    torch.testing.assert_close(scores, wanted, rtol=5e-3, atol=5e-3)


# ---- training ----------------------------------------------------------------------------------------------------


def test_target() -> None:
    sensitivity = torch.tensor([0.0, 0, 0, 4, 0, 0, 1, 0, 9, 9])
    found = train.target(sensitivity, window=2, pool=3)
    assert found.tolist() == pytest.approx([0, 0, 2 / 9, 2 / 9, 2 / 9, 1 / 9, 1 / 9, 1 / 9, 0, 0])
    assert sensitivity[-1] == 9  # left as it was
    assert train.target(torch.ones(3), window=5).tolist() == [0, 0, 0]
    assert train.target(torch.ones(40), window=5).sum() == pytest.approx(1)


def toy() -> tuple[list[ProbeInput], list[Any]]:
    """What matters is spelled out in one state."""
    rows = random_rows(5, tuple(range(20, 36)))
    targets = [torch.softmax(3 * row.states[:, 7].float(), 0) for row in rows]
    return rows, targets


def divergence(probe: Probe, rows: list[ProbeInput], targets: list[Any]) -> float:
    with torch.no_grad():
        found = [probe(ProbeInput.pad([row]))[0].log_softmax(-1) for row in rows]
    return float(
        sum((t * (t.clamp(min=1e-9).log() - f)).sum() for t, f in zip(targets, found, strict=True)) / len(rows)
    )


def test_distill_lowers_the_loss_and_is_reproducible() -> None:
    rows, targets = toy()
    results, done = [], []
    for _ in range(2):
        torch.manual_seed(1)
        probe = Probe(WIDTH, HEADS, WINDOW)
        before = divergence(probe, rows, targets)
        train.distill(probe, rows, targets, seed=4, epochs=15, progress=done.append)
        results.append(divergence(probe, rows, targets))
    assert results[0] < 0.5 * before
    assert results[0] == results[1] and done == [*range(1, 16)] * 2


def soft(scores: Any, valid: Any, keeps: list[float], temperature: float) -> tuple[Any, float]:
    bias, excess = train.soft_bias(scores, valid, keeps, 1, WINDOW, temperature)
    return bias, float(excess)


def test_soft_bias_leaves_forced_tokens_and_padding_open() -> None:
    x = ProbeInput.pad(random_rows())
    scores = torch.randn(x.valid.shape, generator=torch.Generator().manual_seed(1))
    keeps = [0.5, 0.5, 0.25, 0.5, 0.125, 0.5]
    bias, excess = soft(scores, x.valid, keeps, 0.5)
    assert bias.shape == scores.shape and (bias <= 0).all() and bias.isfinite().all() and excess >= 0
    for row, n in enumerate(LENGTHS):
        first = x.valid.shape[1] - n
        assert (bias[row, : first + 1] == 0).all() and (bias[row, -WINDOW:] == 0).all()
        free = bias[row, first + 1 : -WINDOW]
        assert (free < 0).all()  # no gate of a free token is quite open
        mine = scores[row, first + 1 : -WINDOW]
        assert torch.equal(free.argsort(), mine.argsort())  # higher scores, opener gates
        alone, _ = soft(scores[row : row + 1, first:], x.valid[row : row + 1, first:], keeps[row : row + 1], 0.5)
        torch.testing.assert_close(bias[row, first:], alone[0])


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_cold_soft_bias_is_the_selection(keep: float) -> None:
    n = 60
    scores = torch.randn(1, n, generator=torch.Generator().manual_seed(2))
    bias, excess = soft(scores, torch.ones(1, n, dtype=torch.bool), [keep], 1e-4)
    kept = select(scores[0].numpy(), keep_count(n, keep, 1, WINDOW), 1, WINDOW)
    # the k-th largest free score sits in the middle of the sigmoid, everything else at an end
    assert (bias[0] > -0.7).nonzero()[:, 0].tolist() == kept.tolist()
    assert excess < 1 / (n - 1 - WINDOW)
    assert soft(scores, torch.ones(1, n, dtype=torch.bool), [keep], 100.0)[1] == pytest.approx(
        max(0.0, 0.5 - (len(kept) - 1 - WINDOW) / (n - 1 - WINDOW)), abs=0.02
    )


def test_soft_bias_of_prompts_without_free_tokens() -> None:
    valid = torch.ones(2, WINDOW, dtype=torch.bool)
    bias, excess = soft(torch.randn(2, WINDOW), valid, [0.5, 0.5], 0.3)
    assert (bias == 0).all() and excess == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_tune_lowers_its_loss_and_leaves_the_model_alone(frozen: bool) -> None:
    model = tiny().requires_grad_(not frozen)
    decoder = Decoder.of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    items = [Item(tokens(20 + n % 5, seed=n), tokens(2, seed=n + 50)) for n in range(10)]
    observations = observe(decoder, items, (2,), WINDOW)
    torch.manual_seed(3)
    probe = Probe(WIDTH, HEADS, WINDOW)

    def loss() -> float:
        gates = train.SoftGates(probe, range(2, LAYERS), collate(items), [0.25] * len(items), 1, 0.5)
        with torch.no_grad():
            return float(train.gated_loss(decoder, gates, observations))

    before, done = loss(), []
    train.tune(probe, decoder, 2, items, observations, 1, seed=0, steps=30, rows=4, progress=done.append)
    assert loss() < before - 0.05
    assert done == list(range(1, 31))
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_answers_reach_every_part_of_the_probe() -> None:
    """The gradient of the cross-entropy alone, through the frozen layers and the gates."""
    items = [Item(tokens(n, seed=n), tokens(2, seed=n)) for n in (19, 24)]
    decoder = Decoder.of(tiny())
    probe = random_probe()
    gates = train.SoftGates(probe, range(2, LAYERS), collate(items), [0.5, 0.25], 1, 0.5)
    loss = train.gated_loss(decoder, gates, observe(decoder, items, (2,), WINDOW)) - 2 * gates.excess
    for gradient in torch.autograd.grad(loss, list(probe.parameters())):
        assert gradient.isfinite().all() and (gradient != 0).any()


def test_open_gates_cost_the_dense_cross_entropy() -> None:
    """With everything kept the loss is the entropy of the dense model's own likely tokens: nothing is lost."""
    decoder = Decoder.of(tiny())
    items = [Item(tokens(n, seed=n), tokens(2, seed=n)) for n in (9, 14, 30)]
    observations = observe(decoder, items, (1,), WINDOW)
    gates = train.SoftGates(random_probe(), range(1, LAYERS), collate(items), [1.0] * 3, 1, 1e-4)
    with torch.no_grad():
        found = float(train.gated_loss(decoder, gates, observations))
    entropy = sum(float(-(o.weight * o.weight.log()).sum(-1).mean()) for o in observations) / len(items)
    assert found == pytest.approx(entropy, abs=0.05) and float(gates.excess) == 0


def test_tune_is_reproducible() -> None:
    decoder = Decoder.of(tiny())
    items = [Item(tokens(20, seed=n), tokens(2, seed=n)) for n in range(5)]
    observations = observe(decoder, items, (1,), WINDOW)
    found = []
    for _ in range(2):
        probe = random_probe()
        train.tune(probe, decoder, 1, items, observations, 1, seed=6, steps=4)
        found.append(torch.cat([p.detach().flatten() for p in probe.parameters()]))
    assert torch.equal(*found) and not torch.equal(
        found[0], torch.cat([p.detach().flatten() for p in random_probe().parameters()])
    )
