"""fstq_engines.parity: what is let pass, closely and where inputs are rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fstq_engines import parity
from numpy.typing import NDArray

from fstq_infer.errors import ParityError

LOGITS = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32) * 3
KEPT = np.arange(40)[None]
CASE = parity.Case("pruned", (np.arange(44),), np.array([[40]]))
DENSE = parity.Case("dense", (np.arange(44),), np.array([[44]]))


def noisy(size: float, seed: int) -> NDArray[Any]:
    noise = np.random.default_rng(seed).normal(size=LOGITS.shape).astype(np.float32)
    return LOGITS + noise * np.float32(size * LOGITS.std())


def outputs(logits: NDArray[Any], kept: NDArray[Any] = KEPT) -> list[parity.Output]:
    return [parity.Output((logits,), (np.arange(44)[None],)), parity.Output((logits, logits), (kept,))]


def rounded(found: list[parity.Output], noise: float = 0.02) -> parity.Parity:
    return parity.compare_rounded([DENSE, CASE], outputs(LOGITS), outputs(noisy(noise, 1)), found, "float32")


def test_other_rounding_of_the_same_size_passes() -> None:
    result = rounded(outputs(noisy(0.02, 2)))
    assert 0.018 < result.difference < 0.022 and 0.036 < result.tolerance < 0.046
    assert (result.tokens_apart, result.tokens_allowed) == (0, parity.LEAST_TOKENS)


@pytest.mark.parametrize("wrong", [noisy(0.06, 2), LOGITS * 1.05, np.roll(LOGITS, 1, 1), LOGITS * np.float32(np.nan)])
def test_what_rounding_does_not_explain_is_refused(wrong: NDArray[Any]) -> None:
    with pytest.raises(ParityError, match=r"other logits.*dense, prefill.*2 times what rounding"):
        rounded(outputs(wrong))


def test_the_less_rounding_does_the_closer_an_engine_must_be() -> None:
    assert rounded(outputs(LOGITS)).difference == 0
    with pytest.raises(ParityError):
        rounded(outputs(noisy(0.02, 2)), noise=0.002)


def test_other_kept_tokens_pass_as_far_as_rounding_changes_them() -> None:
    swapped, others = np.where(KEPT < 2, KEPT + 50, KEPT), np.where(KEPT < 12, KEPT + 50, KEPT)
    assert rounded(outputs(noisy(0.02, 2), swapped)).tokens_apart == 2
    with pytest.raises(ParityError, match=r"other tokens.*pruned: 12 of a row differ, at most 2 may"):
        rounded(outputs(LOGITS, others))
    written = outputs(noisy(0.02, 1), others)
    found = parity.compare_rounded([DENSE, CASE], outputs(LOGITS), written, outputs(LOGITS, others), "float32")
    assert (found.tokens_apart, found.tokens_allowed) == (12, 26)


def test_where_nothing_is_rounded_nothing_but_the_last_bits_may_differ() -> None:
    def compare(found: list[parity.Output]) -> parity.Parity:
        return parity.compare([DENSE, CASE], outputs(LOGITS), found, "float32")

    assert compare(outputs(noisy(1e-5, 1))).difference < 1e-3
    with pytest.raises(ParityError, match=r"dense, prefill"):
        compare(outputs(noisy(0.01, 1)))
    with pytest.raises(ParityError, match=r"pruned, stage 1, 1 of 40"):
        compare(outputs(LOGITS, np.where(KEPT == 3, 43, KEPT)))
