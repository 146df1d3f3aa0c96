"""fstq_infer.fisher.select: how many tokens stay, and which."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fstq_infer.fisher.select import keep_count, mass_count, max_pool, select

ratios = st.floats(0, 1, exclude_min=True)
forced = st.integers(0, 20)
levels = st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 2.0, np.inf])  # few levels, so that ties abound
scores = arrays.arrays(np.float64, st.integers(1, 60), elements=levels | st.floats(-5, 5))


@given(st.integers(0, 5000), ratios, forced, forced)
def test_keep_count_is_the_ratio_rounded_up_within_bounds(tokens: int, ratio: float, sink: int, window: int) -> None:
    count = keep_count(tokens, ratio, sink, window)
    assert min(tokens, max(sink + window, 1)) <= count <= tokens
    if sink + window < count < tokens:
        assert ratio * tokens - 1e-6 <= count <= ratio * tokens + 1


@given(st.integers(0, 5000), ratios, ratios, forced, forced)
def test_keep_count_is_monotone(tokens: int, one: float, other: float, sink: int, window: int) -> None:
    low, high = sorted((one, other))
    assert keep_count(tokens, low, sink, window) <= keep_count(tokens, high, sink, window)
    assert keep_count(tokens, low, sink, window) <= keep_count(tokens + 1, low, sink, window)
    assert keep_count(tokens, 1.0, sink, window) == tokens


@pytest.mark.parametrize("percent", range(1, 101))
def test_keep_count_of_a_round_percentage_is_exact(percent: int) -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    assert keep_count(100, percent / 100, 0, 0) == percent
    assert keep_count(700, percent / 100, 0, 0) == 7 * percent


@given(scores, st.data(), forced, forced)
def test_select(values: np.ndarray, data: st.DataObject, sink: int, window: int) -> None:
    size = len(values)
    keep = data.draw(st.integers(min(size, max(1, sink + window)), size))
    kept = select(values, keep, sink, window)
    assert kept.dtype == np.int64 and len(kept) == keep
    assert (np.diff(kept) > 0).all() and kept[0] >= 0 and kept[-1] < size
    must = {*range(min(sink, size)), *range(max(0, size - window), size)}
    assert must <= set(kept.tolist())
    chosen = set(kept.tolist()) - must
    for inside in chosen:
        for outside in set(range(size)) - set(kept.tolist()):
            tied_to_the_left = values[inside] == values[outside] and inside < outside
            assert values[inside] > values[outside] or tied_to_the_left
    if keep < size:
        assert set(kept.tolist()) < set(select(values, keep + 1, sink, window).tolist())


@given(scores)
def test_select_all_and_one(values: np.ndarray) -> None:
    assert select(values, len(values), 0, 0).tolist() == list(range(len(values)))
    assert select(values, 1, 0, 0).tolist() == [int(values.argmax())]
    assert select(values, 1, 0, 1).tolist() == [len(values) - 1]


def test_select_leaves_its_input_alone_and_takes_any_float() -> None:
    values = np.array([3, 1, 2, 0, 1], np.float32)
    before = values.copy()
    for dtype in (np.float16, np.float32, np.float64):
        assert select(values.astype(dtype), 3, 1, 1).tolist() == [0, 2, 4]
    assert (values == before).all()


def test_no_score_outdoes_the_forced_tokens() -> None:
    values = np.array([0.0, np.inf, np.inf, np.nan, 0.0])
    assert select(values, 2, 1, 1).tolist() == [0, 4]
    assert select(values, 4, 1, 1).tolist() == [0, 1, 2, 4]


@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(-5, 5)), st.integers(1, 40))
def test_max_pool_is_the_naive_one(values: np.ndarray, width: int) -> None:
    pooled = max_pool(values, width)
    before, after = width // 2, math.ceil(width / 2)
    assert pooled.tolist() == [values[max(0, i - before) : i + after].max() for i in range(len(values))]


finite = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-5, 5, width=32))


@given(finite, st.floats(0.01, 0.99), forced, forced, st.sampled_from([1.0, 5.0]))
def test_mass_count_is_the_fewest_tokens_that_hold_the_mass(
    scores: np.ndarray, mass: float, sink: int, window: int, scale: float
) -> None:
    count = mass_count(scores, mass, sink, window, scale)
    free = scores[sink : max(sink, len(scores) - window)].astype(float)
    kept = count - (len(scores) - len(free))
    assert 0 <= kept <= len(free) and (kept >= 1) == (len(free) > 0)
    if len(free):
        weights = np.sort(np.exp(free / scale))[::-1] / np.exp(free / scale).sum()
        assert weights[:kept].sum() >= mass - 1e-5
        assert weights[: kept - 1].sum() < mass + 1e-5


@given(finite, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_mass_count_rises_with_the_mass_and_ignores_a_shift(scores: np.ndarray, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert mass_count(scores, low, 1, 2) <= mass_count(scores, high, 1, 2)
    level = np.zeros(40, np.float32)
    assert mass_count(level, 0.5, 0, 0) == mass_count(level + 7, 0.5, 0, 0) == 20


def test_mass_count_follows_how_sharp_the_scores_are() -> None:
    """One token that stands out is enough; level scores need their share of all."""
    sharp = np.zeros(100, np.float32)
    sharp[30] = 20
    assert mass_count(sharp, 0.9, 1, 4) == 6
    assert mass_count(np.zeros(100, np.float32), 0.9, 1, 4) == 5 + 86
