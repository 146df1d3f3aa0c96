"""Selectors, feedback and quantizers: every row of each registry, and small cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction", reason="quantizers need the 'federated' extra")

from fstq_infer.errors import DeltaError, OptionError
from fstq_infer.federated import allocate, codes, quantize, select
from fstq_infer.federated.compress import Compressor
from fstq_infer.federated.feedback import FEEDBACKS, State, feedback
from fstq_infer.federated.layer import Layer
from fstq_infer.federated.lloyd import lloyd_max, nearest
from fstq_infer.federated.quantize import QUANTIZERS
from fstq_infer.federated.select import SELECTORS, per_tensor, top

from .samples import BASE, manifest

LIGHT = settings(max_examples=60, deadline=None)

# ---- selection ---------------------------------------------------------------------------------------------------


@LIGHT
@given(st.integers(0, 2**32), st.integers(1, 60_000), st.floats(0, 1), st.booleans())
def test_top_is_a_stable_sort(seed: int, size: int, share: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 9, size).astype(np.float32) if ties else rng.standard_t(2, size).astype(np.float32) ** 2
    count = int(share**3 * size)
    assert np.array_equal(top(scores, count), np.sort(np.argsort(-scores, kind="stable")[:count]))


def test_top_survives_a_misleading_sample() -> None:
    scores = np.zeros(100_000, np.float32)
    scores[1::2] = 1  # a sample of every 24th coordinate sees none of these
    assert top(scores, 50_000).tolist() == list(range(1, 100_000, 2))
    assert top(scores, 10).tolist() == list(range(1, 21, 2))


def test_per_tensor_takes_the_best_first() -> None:
    scores = np.array([1, 5, 3, 9, 7, 2, 8, 8], np.float32)
    first, second = per_tensor(scores, np.array([5, 3]), np.array([[1, 1], [2, 1]]))
    assert first.tolist() == [3, 6] and second.tolist() == [1, 4, 7]


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name: str) -> None:
    update, fisher = np.array([1, -2, 0, 3], np.float32), np.array([4, 0, 0, 0], np.float32)
    scores = SELECTORS[name](update, fisher, 1)
    assert scores.shape == (4,) and scores.dtype == np.float32 and (scores >= 0).all()
    assert np.array_equal(scores, SELECTORS[name](update, fisher, 1))
    best = {"fisher": 0, "magnitude": 3, "paper": 0}
    if name in best:
        assert np.argmax(scores) == best[name]
        assert np.argmax(SELECTORS[name](update, None, 1)) == 3
    assert update.tolist() == [1, -2, 0, 3]


@pytest.mark.parametrize(
    "find", [select.selector, feedback, quantize.quantizer, allocate.allocation, codes.code,
             lambda name: Compressor.preset(name, manifest([1]), BASE)],
)  # fmt: skip
def test_unknown_names_list_the_known_ones(find: object) -> None:
    with pytest.raises(OptionError, match="choose one of"):
        find("nothing")  # type: ignore[operator]


# ---- feedback ----------------------------------------------------------------------------------------------------

SENT, VALUES = np.array([1]), np.array([2.5], np.float32)


def step(name: str, state: State) -> tuple[list[float], State]:
    """(update, next state) for the delta 1, 3."""
    row = FEEDBACKS[name]
    update, pending = row.before(np.array([1, 3], np.float32), state)
    seen = update.tolist()
    return seen, row.after(update, pending, SENT, VALUES)


def test_no_feedback() -> None:
    assert step("none", step("none", State())[1]) == ([1, 3], State())


@pytest.mark.parametrize(("name", "decay"), [("ef", 1.0), ("decayed", 0.9)])
def test_error_feedback(name: str, decay: float) -> None:
    update, state = step(name, State())
    assert update == [1, 3] and state.residual is not None and state.residual.tolist() == [1, 0.5]
    update, state = step(name, state)
    assert update == pytest.approx([1 + decay, 3 + 0.5 * decay]) and state.velocity is None


def test_momentum_masked() -> None:
    update, state = step("momentum-masked", State())
    assert update == [1, 3] and state.velocity is not None and state.velocity.tolist() == [1, 0]
    update, state = step("momentum-masked", state)  # velocity 0.9 + 1 and 3; residual 1 and 0.5
    assert update == pytest.approx([2.9, 3.5]) and state.velocity is not None
    assert state.velocity.tolist() == pytest.approx([1.9, 0])


@pytest.mark.parametrize("name", FEEDBACKS)
def test_feedback_leaves_the_old_state_alone(name: str) -> None:
    _, state = step(name, State())
    before = [None if array is None else array.tolist() for array in (state.residual, state.velocity)]
    step(name, state)
    assert before == [None if array is None else array.tolist() for array in (state.residual, state.velocity)]


# ---- quantizers --------------------------------------------------------------------------------------------------


def decoded(name: str, values: np.ndarray, counts: list[int], weights: np.ndarray | None = None) -> np.ndarray:
    parts = np.array(counts)
    applied = quantize.apply(values.astype(np.float32), parts, {1: name}, np.ones(len(parts), int), weights)
    exponent, scales, ids, blocks = applied
    return Layer(ids, np.zeros(len(parts), np.uint8), parts, exponent, scales, np.arange(len(values)), blocks).values()


def error(name: str, values: np.ndarray, counts: list[int]) -> float:
    wide = values.astype(np.float64)
    return float(np.square(decoded(name, values, counts) - wide).sum() / np.square(wide).sum())


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 1e20])
def test_quantizers_are_near(name: str, magnitude: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=3000) * np.repeat([1, 30], 1500) * magnitude).astype(np.float32)
    bound = {"fp32": 0.0, "fp16": 1e-6, "bf16": 1e-5, "lloyd1": 0.4, "lloyd2": 0.13, "lloyd3": 0.05, "lloyd4": 0.015,
             "lloyd8": 2e-4, "nf4": 0.03, "int2": 0.35, "int4": 0.03, "int8": 2e-4, "uniform2": 0.8, "uniform4": 0.06,
             "uniform8": 2e-4}[name]  # fmt: skip
    if name != "fp16" or magnitude == 1.0:  # fp16 has no scale, so its range is its own
        assert error(name, values, [1500, 1500]) <= bound


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_take_zeros_and_single_values(name: str) -> None:
    zeros = decoded(name, np.zeros(5), [2, 3])
    assert np.abs(zeros).max() < 1e-7
    for value in (0.5, -3e-6, 7e4):
        found = decoded(name, np.array([value]), [1])
        assert np.isfinite(found).all() and (name == "fp16" or found[0] == pytest.approx(value, rel=0.01))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_raw_codes_are_exact_for_their_own_numbers(name: str) -> None:
    values = np.array([0.0, -0.0, 1.5, -(2.0**-14), 65504 if name == "fp16" else 3.3895313892515355e38], np.float32)
    assert np.array_equal(decoded(name, values, [5]).view(np.uint32), values.view(np.uint32))
    assert np.isfinite(decoded(name, np.array([3.4028235e38, -3.4028235e38]), [2])).all()


def test_lloyd_beats_uniform_on_the_same_bits() -> None:
    """What the paper's quantizer loses: at 2 bits nearly everything becomes 0."""
    values = np.random.default_rng(0).standard_t(4, 20_000)
    kept = np.sort(np.abs(values))[-1000:] * np.random.default_rng(1).choice([-1, 1], 1000)
    assert error("lloyd2", kept, [1000]) < error("uniform2", kept, [1000]) / 3


def test_lloyd_max_of_two_clusters() -> None:
    mass = np.zeros(1 << 15)
    for value, weight in ((1.0, 3), (1.5, 1), (8.0, 5)):
        mass[np.float16(value).view(np.uint16)] = weight
    assert lloyd_max(mass, 2).tolist() == [1.125, 8.0]
    assert lloyd_max(mass, 1).tolist() == [np.float16((3 + 1.5 + 40) / 9)]
    assert nearest(np.array([1, 8], np.float16))[np.array([0.5, 4.5, 4.6, 9], np.float16).view(np.uint16)].tolist() == [
        0, 0, 1, 1,
    ]  # fmt: skip


def test_weights_pull_the_table() -> None:
    values = np.array([1.0, 1.0, 1.0, 5.0])
    plain = decoded("lloyd1", values, [4])
    weighted = decoded("lloyd1", values, [4], np.array([0, 0, 0, 1], np.float32))
    assert plain[0] == pytest.approx(2, rel=1e-3) and weighted[0] == pytest.approx(5, rel=1e-3)


def test_diverged_delta() -> None:
    with pytest.raises(DeltaError, match="diverged"):
        decoded("lloyd2", np.array([1e32]), [1])
