"""Mosaic messages: tiles that cover, budgets, one bit each, completion by hand, and whole rounds of Flower."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from fstq_infer.errors import DeltaError, MessageError, MessageManifestError, MessageRoundError, OptionError
from fstq_infer.federated import mosaic
from fstq_infer.federated.mosaic import WORD, Part, Tile, complete
from fstq_infer.federated.tensors import TensorManifest

from .samples import BASE

MANIFEST = TensorManifest((("a", (50, 40)), ("b", (3000,)), ("c", (8,)), ("d", (6000,))))
TOTAL = MANIFEST.parameters


def delta(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 1e-3, shape).astype(np.float32) for name, shape in MANIFEST.tensors}


@pytest.mark.parametrize("slots", [1, 2, 7, 10])
@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
def test_each_coordinate_is_in_the_same_number_of_tiles(slots: int, share: float) -> None:
    tiles = [Tile(3, slot, slots, int(share * WORD)) for slot in range(slots)]
    covers = np.zeros(TOTAL, int)
    for tile in tiles:
        indices = tile.indices(MANIFEST)
        assert (np.diff(indices) > 0).all() and abs(len(indices) / TOTAL - share) < 0.03
        covers[indices] += 1
    assert covers.max() - covers.min() <= 1 and abs(covers.mean() - share * slots) < 0.05


def test_tiles_change_from_round_to_round() -> None:
    first, second = (Tile(number, 0, 4, WORD // 4).indices(MANIFEST) for number in (1, 2))
    assert 0.15 < len(np.intersect1d(first, second)) / len(first) < 0.35


@settings(max_examples=80, deadline=None)
@given(st.integers(56, 4000), st.integers(0, 9), st.integers(0, 1000))
def test_messages_fit_their_budget_and_nearly_fill_it(budget: int, slot: int, number: int) -> None:
    tile = Tile.within(MANIFEST, number, slot, 10, budget)
    blob = mosaic.compress(delta(number), MANIFEST, BASE, tile)
    if budget >= 200:
        assert len(blob) <= budget
    if 400 <= budget <= 1300:
        assert len(blob) >= 0.8 * budget
    indices, values = mosaic.decompress(blob, MANIFEST, BASE, tile)
    whole = MANIFEST.flatten(delta(number))[indices]
    assert (np.sign(values) == np.sign(whole)).all() and np.abs(values).max() < 1e-2


def test_one_bit_leaves_what_lloyd_and_max_say() -> None:
    """Of a normal law one bit leaves 1 - 2 / pi of the energy."""
    tile = Tile(1, 0, 1, WORD)
    indices, values = mosaic.decompress(mosaic.compress(delta(), MANIFEST, BASE, tile), MANIFEST, BASE, tile)
    whole = MANIFEST.flatten(delta())
    assert len(indices) == TOTAL
    assert np.square(values - whole).sum() / np.square(whole).sum() == pytest.approx(1 - 2 / np.pi, abs=0.02)


@pytest.mark.parametrize(
    "other",
    [Tile(1, 1, 4, WORD // 4), Tile(1, 0, 5, WORD // 4), Tile(1, 0, 4, WORD // 4 + 1), Tile(2, 0, 4, WORD // 4)],
)
def test_another_tile_is_refused(other: Tile) -> None:
    blob = mosaic.compress(delta(), MANIFEST, BASE, Tile(1, 0, 4, WORD // 4))
    assert mosaic.is_tile(blob, MANIFEST)
    with pytest.raises((MessageManifestError, MessageRoundError)):
        mosaic.decompress(blob, MANIFEST, BASE, other)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 600), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    tile = Tile(1, 0, 4, WORD // 4)
    blob = bytearray(mosaic.compress(delta(), MANIFEST, BASE, tile))
    blob[at % len(blob)] ^= change
    with pytest.raises(MessageError):
        mosaic.decompress(bytes(blob), MANIFEST, BASE, tile)


def test_completion_by_hand() -> None:
    parts = [
        Part(np.array([1, 2], np.float32), np.array([0, 1]), 1.0),
        Part(np.array([4, 8], np.float32), np.array([1, 2]), 3.0),
        Part(np.array([0, 0, 0, 6, 0], np.float32), None, 4.0),
    ]
    found = complete(parts, 5)
    np.testing.assert_allclose(found[0], [1, 2, 24 / 7, 6, 0])
    np.testing.assert_allclose(found[1], [0.2, 4, 8, 6, 0])
    np.testing.assert_array_equal(found[2], [0, 0, 0, 6, 0])
    mean = np.average(found, axis=0, weights=[1, 3, 4])
    np.testing.assert_allclose(mean[1], (1 * 2 + 3 * 4) / 8, rtol=1e-6)
    alone = complete(parts[:1], 3)[0]
    np.testing.assert_array_equal(alone, [1, 2, 0])


@pytest.mark.parametrize(("senders", "step"), [(None, 1), (1, 1), (2, 1), (4, 0.5), (20, 0.1)])
def test_fewer_senders_than_the_step_was_chosen_for_make_it_smaller(senders: int | None, step: float) -> None:
    parts = [
        Part(np.array([1, 2], np.float32), np.array([0, 1]), 1.0),
        Part(np.array([4], np.float32), np.array([2]), 3.0),
    ]
    for whole, found in zip(complete(parts, 4), complete(parts, 4, senders), strict=True):
        np.testing.assert_allclose(found, step * whole, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.floats(0.05, 1), st.integers(0, 99))
def test_the_mean_of_completed_deltas_is_that_of_the_senders(clients: int, share: float, seed: int) -> None:
    rng, tiles = np.random.default_rng(seed), [Tile(seed, slot, clients, int(share * WORD)) for slot in range(clients)]
    weights = rng.uniform(0.5, 5, clients)
    parts = [
        Part(rng.normal(size=len(tile.indices(MANIFEST))).astype(np.float32), tile.indices(MANIFEST), float(weight))
        for tile, weight in zip(tiles, weights, strict=True)
    ]
    mean = np.average(complete(parts, TOTAL), axis=0, weights=weights)
    sums, sent = np.zeros(TOTAL), np.zeros(TOTAL)
    for part in parts:
        sums[part.indices] += part.weight * part.values
        sent[part.indices] += part.weight
    np.testing.assert_allclose(mean, np.divide(sums, sent, out=np.zeros(TOTAL), where=sent > 0), atol=1e-6)


def test_impossible_tiles_and_deltas() -> None:
    for slot, slots, share in ((1, 1, 1), (-1, 2, 1), (0, 1, 0), (0, 1, WORD + 1)):
        with pytest.raises(OptionError):
            Tile(1, slot, slots, share)
    with pytest.raises(DeltaError):
        mosaic.compress(delta() | {"b": np.full(3000, np.nan, np.float32)}, MANIFEST, BASE, Tile(1, 0, 1, WORD))
    tiny = TensorManifest((("a", (1,)),))
    assert Tile(5, 0, 3, 1).indices(tiny).tolist() == [0]


def test_rounds_of_flower(tmp_path: Path) -> None:
    """Each client sends a third or so; what is averaged is what was sent, and moves as plain FedAvg does."""
    pytest.importorskip("flwr", reason="the strategy needs the 'federated' extra")
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

    from fstq_infer.federated.budget import SameBudget
    from fstq_infer.federated.local import LocalGrid
    from fstq_infer.federated.strategy import FstqStrategy

    from .flower_apps import arrays_in, make_app, make_grid, record, weights

    manifest, rounds = TensorManifest.of(weights()), 12
    strategy = FstqStrategy(FedAvg(), BASE, SameBudget(400))
    result = strategy.start(make_grid(tmp_path, "mosaic", clients=8), record(weights()), rounds)
    plain = FedAvg().start(LocalGrid(make_app([]), 8), record(weights()), rounds)
    moved = manifest.flatten(arrays_in(result.arrays)) - manifest.flatten(weights())
    wanted = manifest.flatten(arrays_in(plain.arrays)) - manifest.flatten(weights())
    assert np.corrcoef(moved, wanted)[0, 1] > 0.5 and 0.5 < moved.std() / wanted.std() < 2
    for metrics in result.train_metrics_clientapp.values():
        assert metrics["fstq-used"] == 8 and metrics["fstq-refused"] == 0 and metrics["fstq-bytes"] <= 8 * 400
    assert not list(tmp_path.iterdir())  # clients remember nothing
    private = FstqStrategy(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 1.0, 8), BASE, SameBudget(400))
    refused = private.start(make_grid(tmp_path, "mosaic", clients=8), record(weights()), 1)
    assert refused.train_metrics_clientapp[1]["fstq-refused-PrivacyOrderError"] == 8


def test_a_round_of_flower_with_fewer_senders_moves_less(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the strategy needs the 'federated' extra")
    from flwr.serverapp.strategy import FedAvg

    from fstq_infer.federated.budget import SameBudget
    from fstq_infer.federated.strategy import FstqStrategy

    from .flower_apps import arrays_in, make_grid, record, weights

    moved = list[Any]()
    for senders in (None, 8, 32):
        strategy = FstqStrategy(FedAvg(), BASE, SameBudget(400), run="run", senders=senders)
        result = strategy.start(make_grid(tmp_path, "mosaic", clients=8), record(weights()), 1)
        moved.append({name: new - weights()[name] for name, new in arrays_in(result.arrays).items()})
    for name, change in moved[0].items():
        np.testing.assert_allclose(moved[1][name], change, atol=1e-7)
        np.testing.assert_allclose(moved[2][name], change / 4, atol=1e-6)
    with pytest.raises(OptionError, match="senders"):
        FstqStrategy(FedAvg(), BASE, senders=0)


def test_filling_in_never_ends_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile within max_norm stays so when it is completed; what cannot be completed is a refused reply."""
    pytest.importorskip("flwr", reason="the strategy needs the 'federated' extra")
    from flwr.serverapp.strategy import FedAvg

    from fstq_infer.errors import MessageValueError
    from fstq_infer.federated.budget import SameBudget
    from fstq_infer.federated.strategy import FstqStrategy

    from .flower_apps import make_grid, record, weights

    norms, limit = list[float](), 0.0
    real = FstqStrategy._absolute
    made, failing = 0, False

    def absolute(self: Any, flat: Any, manifest: Any) -> Any:
        nonlocal made
        made += 1
        norms.append(float(np.linalg.norm(flat)))
        if failing and made == 9:  # eight tiles, then the first one completed
            raise MessageValueError("not finite")
        return real(self, flat, manifest)

    monkeypatch.setattr(FstqStrategy, "_absolute", absolute)
    for failing, used in ((False, 8), (False, 8), (True, 7)):  # noqa: B007
        made = 0
        random.seed(0)  # Flower draws slots with it
        strategy = FstqStrategy(FedAvg(), BASE, SameBudget(0), max_norm=limit or None)
        metrics = strategy.start(make_grid(tmp_path, "mosaic", clients=8), record(weights()), 1)
        assert metrics.train_metrics_clientapp[1]["fstq-used"] == used
        limit = 1.0001 * max(norms[:8])
        assert max(norms[8:16]) > limit  # completed
    assert strategy.refused == {"MessageValueError": 1}


def test_strategies_that_compare_replies_take_no_tiles(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the strategy needs the 'federated' extra")
    from flwr.serverapp.strategy import FedMedian

    from fstq_infer.federated.budget import SameBudget
    from fstq_infer.federated.strategy import FstqStrategy

    from .flower_apps import make_grid, record, weights

    result = FstqStrategy(FedMedian(), BASE, SameBudget(0)).start(make_grid(tmp_path, "mosaic"), record(weights()), 1)
    assert result.train_metrics_clientapp[1]["fstq-refused-ReplyError"] == 4
