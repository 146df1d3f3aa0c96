"""fstq_infer.fisher.probe and train: features, the probe's invariances, and distillation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")

import torch

from fstq_infer.fisher import train
from fstq_infer.fisher.gates import observe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.fisher.probe import EPSILON, Probe, ProbeInput, lexical

from .models import HEADS, WIDTH, tiny, tokens

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
