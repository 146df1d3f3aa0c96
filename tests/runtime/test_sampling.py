"""Sampling: validation, support sets against a naive reference and Hugging Face, draws, speed-critical shortcuts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.errors import EngineError, OptionError
from fstq_infer.runtime.sampling import Sampler, Sampling, _draw, candidates, top_ids
from fstq_infer.runtime.sampling import penalized as penalized_logits


def random_logits(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3


def penalized(logits: np.ndarray, history: list[int], penalty: float) -> np.ndarray:
    logits = logits.copy()
    for token in set(history):
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    return logits


def naive_support(logits: np.ndarray, sampling: Sampling) -> tuple[set[int], float]:
    """Kept ids, and how close a cumulative probability comes to top_p (a tie that rounding may decide)."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        least = scaled[order[min(sampling.top_k, len(order)) - 1]]
        order = [i for i in order if scaled[i] >= least]
    if sampling.top_p == 1:
        return set(order), 1.0
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
    kept = {i for i, mass in zip(order, before, strict=True) if mass < sampling.top_p}
    return kept, float(np.abs(before - sampling.top_p).min())


def support(logits: np.ndarray, sampling: Sampling) -> set[int]:
    ids, weights = candidates(logits, sampling)
    return set(range(len(weights))) if ids is None else set(ids.tolist())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", None),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("seed", -1),
        ("seed", 1.0),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name}=.*expected"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_greedy_takes_the_first_maximum_and_ignores_the_rest() -> None:
    logits = np.array([1, 5, 5, -2], np.float32)
    assert Sampler(Sampling())(logits, []) == 1
    assert Sampler(Sampling(top_k=2, top_p=0.1, seed=3))(logits, []) == 1


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 600),
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, 700),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    ties=st.booleans(),
)
def test_support_equals_a_naive_reference(
    size: int, seed: int, top_k: int, top_p: float, temperature: float, ties: bool
) -> None:
    logits = random_logits(size, seed)
    if ties:
        logits = np.round(logits)
    sampling = Sampling(temperature, top_k, top_p)
    expected, margin = naive_support(logits, sampling)
    if ties and top_p < 1:  # which of equal tokens fill the nucleus is free; how many is not
        if margin > 1e-6:
            assert len(support(logits, sampling)) == len(expected)
    elif margin > 1e-6:
        assert support(logits, sampling) == expected


@pytest.mark.parametrize("k", [1, 50, 100, 4000, 151_999])
@pytest.mark.parametrize("kind", ["normal", "flat", "masked"])
def test_top_ids_of_a_large_vocabulary(k: int, kind: str) -> None:
    logits = random_logits(152_000, k)
    if kind == "flat":
        logits[:] = np.round(logits / 3)
    if kind == "masked":
        logits[10:-10] = -np.inf
    least = np.sort(logits)[-k]
    assert np.array_equal(top_ids(logits, k), np.flatnonzero(logits >= least))


@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.9999])
def test_nucleus_of_a_large_vocabulary(top_p: float) -> None:
    for temperature in (0.5, 4.0):  # a nucleus of few tokens, and one of most of them
        logits = random_logits(20_000, 1)
        sampling = Sampling(temperature, 0, top_p)
        expected, _ = naive_support(logits, sampling)
        assert abs(len(support(logits, sampling)) - len(expected)) <= 1  # rounding of a sum of 20 000 weights


def test_support_equals_hugging_face() -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers")
    process = pytest.importorskip("transformers.generation.logits_process", reason="compares with transformers")
    for seed in range(60):
        rng = np.random.default_rng(seed)
        logits = random_logits(300, seed)
        history = rng.integers(0, 300, 40).tolist()
        sampling = Sampling(
            temperature=float(rng.choice([0.3, 1.0, 2.0])),
            top_k=int(rng.choice([0, 1, 7, 50, 400])),
            top_p=float(rng.choice([0.2, 0.77, 0.95, 1.0])),
            repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        )
        ids, scores = torch.tensor([history]), torch.tensor(logits)[None]
        chain = [
            process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            process.TemperatureLogitsWarper(sampling.temperature),
        ]
        if sampling.top_k:
            chain.append(process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chain.append(process.TopPLogitsWarper(sampling.top_p))
        for step in chain:
            scores = step(ids, scores)
        expected = torch.softmax(scores[0].double(), -1).numpy()
        ours, seen = logits.copy(), np.unique(history)
        ours[seen] = penalized_logits(logits[seen], sampling.repetition_penalty)
        _, margin = naive_support(ours, sampling)
        if margin < 1e-5:
            continue
        kept, weights = candidates(ours, sampling)
        probabilities = np.zeros(300)
        probabilities[slice(None) if kept is None else kept] = weights / weights.sum()
        np.testing.assert_allclose(probabilities, expected, atol=2e-6)


def test_penalty_reads_only_what_is_new_and_leaves_the_logits_alone() -> None:
    rng = np.random.default_rng(0)
    sampler = Sampler(Sampling(repetition_penalty=1.7))
    history = rng.integers(0, 2000, 500).tolist()
    for step in range(400):
        logits = random_logits(1500, step)  # narrower than some ids: those are passed over
        before = logits.copy()
        expected = penalized(logits, [i for i in history if i < 1500], 1.7)
        token = sampler(logits, history)
        assert token == int(np.argmax(expected))
        assert np.array_equal(logits, before)
        history.append(token)


class OverAll(Sampler):
    """A sampler that never draws from a shortlist."""

    def _among_few(self, *_: object) -> None:
        return None


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What a backend may hand on."""
    ids = np.argsort(-logits, kind="stable")[:count]
    return ids, logits[ids] if np.isfinite(logits).all() else np.full(len(ids), np.nan, np.float32)


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from([3, 100, 300, 8_000, 40_000]),
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([1, 2, 20, 50, 300]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
    penalty=st.sampled_from([1.0, 1.1, 3.0, 0.8]),
    temperature=st.sampled_from([0.9, 0.9, 0.0]),
    kind=st.sampled_from(["plain", "ties", "masked"]),
    often=st.booleans(),
    picked=st.sampled_from([0, 64, 128]),
)
def test_the_shortlist_draws_what_all_logits_draw(
    size: int,
    seed: int,
    top_k: int,
    top_p: float,
    penalty: float,
    temperature: float,
    kind: str,
    often: bool,
    picked: int,
) -> None:
    """picked: number of logits that the backend has picked already."""
    sampling = Sampling(temperature, top_k, top_p, penalty, seed)
    few, over_all = Sampler(sampling), OverAll(sampling)
    history = np.random.default_rng(seed).integers(0, size, 200).tolist()
    for step in range(4):
        logits = random_logits(size, seed + step)
        if kind == "ties":
            logits = np.round(logits)
        if kind == "masked":
            logits[::3] = -np.inf
        if often:  # so many likely tokens were seen that the shortlist does not do
            history += np.argsort(-logits)[: 3 * top_k].tolist()
        before = logits.copy()
        history.append(few(logits, history, largest(logits, picked) if picked else None))
        assert over_all(logits, history[:-1]) == history[-1]
        assert np.array_equal(logits, before)


def test_same_seed_same_tokens() -> None:
    rows = [random_logits(500, seed) for seed in range(50)]

    def draw(sampling: Sampling) -> list[int]:
        sampler = Sampler(sampling)
        return [sampler(row, []) for row in rows]

    for extra in ({}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}):
        assert draw(Sampling(1.0, seed=7, **extra)) == draw(Sampling(1.0, seed=7, **extra))
        assert draw(Sampling(1.0, seed=7, **extra)) != draw(Sampling(1.0, seed=8, **extra))
    assert draw(Sampling(1.0)) != draw(Sampling(1.0))


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(1.0, seed=0))
    counts = np.bincount([sampler(logits, []) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.015)


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 3.0]), min_size=1, max_size=1500), st.floats(0, 1, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_draw_inverts_the_running_sum(weights: list[float], uniform: float) -> None:
    array = np.array([*weights, 1.0, 0.0])
    place = _draw(array, uniform)
    assert array[place] > 0
    running = np.cumsum(array)
    assert running[place] >= uniform * running[-1] - 1e-9
    assert running[place] - array[place] <= uniform * running[-1] + 1e-9


def test_draw_at_the_very_end_avoids_weight_zero() -> None:
    assert _draw(np.array([0.0, 1.0, 0.0]), np.nextafter(1.0, 0)) == 1
    assert _draw(np.array([0.0, 1.0, 0.0]), 0.0) == 1
    assert _draw(np.array([0.1] * 600 + [0.0] * 600), 1.0) == 599  # as if rounding had reached the sum


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_engine_error(bad: float, temperature: float) -> None:
    logits = random_logits(100, 0)
    logits[40] = bad
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=5, repetition_penalty=1.1)):
        for picked in (None, largest(logits, 20)):
            with pytest.raises(EngineError, match="largest logit"):
                Sampler(sampling)(logits, [3], picked)
    with pytest.raises(EngineError, match="largest logit"):
        Sampler(Sampling(temperature))(np.full(5, -np.inf, np.float32), [])
    logits[40] = -np.inf  # masked tokens are fine
    assert Sampler(Sampling(temperature))(logits, []) != 40


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(1000, 2)
    for extra in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert Sampler(Sampling(1e-40, **extra))(logits, []) == int(np.argmax(logits))
