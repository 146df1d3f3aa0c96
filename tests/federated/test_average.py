"""Running means of the weights: what is delivered, and that they survive a restart of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="the server needs the 'federated' extra")

from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg

from fstq_infer.errors import OptionError, StateError
from fstq_infer.federated import average
from fstq_infer.federated.budget import SameBudget
from fstq_infer.federated.server import Rounds, federate
from fstq_infer.federated.strategy import FstqStrategy

from .flower_apps import arrays_in, make_grid, record, weights
from .samples import BASE

HALF = {"fraction_train": 0.5, "fraction_evaluate": 0.5}


def run(folder: Path, settings: Rounds, seen: list[Any] | None = None, cut: int | None = None) -> Any:
    def evaluate(round: int, arrays: Any) -> Any:
        if round == cut:
            raise InterruptedError
        if seen is not None:
            seen.append(arrays_in(arrays))
        return MetricRecord({"sum": 1.0})

    strategy = FstqStrategy(FedAvg(**HALF), BASE, SameBudget(700), run="run")
    grid = make_grid(folder / "clients", "fstq", clients=6, exact=False)
    return federate(strategy, grid, record(weights()), settings, evaluate_fn=evaluate)


@given(st.integers(1, 40), st.floats(0, 20))
def test_shares_make_a_mean_in_which_newer_weights_count_more(rounds: int, exponent: float) -> None:
    counts = np.zeros(rounds)
    for number in range(1, rounds + 1):
        share = average.share(number, exponent)
        counts *= 1 - share
        counts[number - 1] += share
    assert counts.sum() == pytest.approx(1) and (np.diff(counts) >= -1e-12).all() and counts.min() >= 0
    if exponent == 0:
        np.testing.assert_allclose(counts, 1 / rounds)


def test_the_mean_is_delivered_and_clients_go_on_from_the_last_weights(tmp_path: Path) -> None:
    last, means = list[Any](), list[Any]()
    run(tmp_path / "last", Rounds(4, seed=1), last)
    result = run(tmp_path / "mean", Rounds(4, seed=1, average=2.0), means)
    for name in weights():
        mean = last[1][name].astype(np.float64)
        for number in range(2, 5):
            mean += average.share(number, 2.0) * (last[number][name] - mean)
        np.testing.assert_allclose(means[-1][name], mean, atol=1e-6)
        assert result.arrays[name].numpy().tobytes() == means[-1][name].tobytes()
        assert np.abs(mean - last[4][name]).max() > 1e-3


def test_integers_are_taken_over() -> None:
    old, new = (
        record({"a": np.array([1, 2]), "b": np.array([0.0])}),
        record({"a": np.array([5, 6]), "b": np.array([2.0])}),
    )
    found = arrays_in(average.moved(old, new, 2, 0.0))
    assert found["a"].tolist() == [5, 6] and found["b"].tolist() == [1.0]


def test_resumed_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    def settings(name: str, **given: Any) -> Rounds:
        return Rounds(4, seed=3, checkpoint=tmp_path / name / "server.safetensors", **{"average": 4.0, **given})

    whole = run(tmp_path / "whole", settings("whole"))
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", settings("cut"), cut=3)
    ours = run(tmp_path / "cut", settings("cut", resume=True))
    for name, values in arrays_in(whole.arrays).items():
        assert values.tobytes() == ours.arrays[name].numpy().tobytes()
    assert (tmp_path / "whole/server.safetensors").read_bytes() == (tmp_path / "cut/server.safetensors").read_bytes()
    done = run(tmp_path / "cut", settings("cut", resume=True))
    assert all(
        values.tobytes() == done.arrays[name].numpy().tobytes() for name, values in arrays_in(ours.arrays).items()
    )
    with pytest.raises(StateError, match="a mean of weights"):
        run(tmp_path / "cut", settings("cut", resume=True, average=None))


@pytest.mark.parametrize("exponent", [-1.0, float("inf"), float("nan")])
def test_exponents_that_make_no_mean_are_refused(exponent: float) -> None:
    with pytest.raises(OptionError, match="exponent"):
        Rounds(3, average=exponent)
