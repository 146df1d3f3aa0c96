"""The whole pipeline: every preset and allocation, budgets that hold, feedback over rounds, errors for bad input."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from fstq_infer.errors import DeltaError, MessageManifestError, MessageModelError, MessageRoundError, OptionError
from fstq_infer.federated import message as messages
from fstq_infer.federated.allocate import ALLOCATIONS, Fixed, Percentile
from fstq_infer.federated.compress import PRESETS, Compressor, decompress
from fstq_infer.federated.feedback import FEEDBACKS, Forget, State
from fstq_infer.federated.select import SELECTORS, Magnitude
from fstq_infer.federated.tensors import TensorManifest
from fstq_infer.federated.water import WaterFilling

from .samples import BASE

SHAPES = {f"layer.{number}.{side}": shape for number in range(4)
          for side, shape in (("lora_A", (8, 96)), ("lora_B", (160, 8)))}  # fmt: skip
MANIFEST = TensorManifest(tuple(SHAPES.items()))
Arrays = dict[str, np.ndarray]


def arrays(seed: int, spread: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_t(4, shape) * 10 ** rng.uniform(-4 - spread, -3)).astype(np.float32)
            for name, shape in SHAPES.items()}  # fmt: skip


def fisher(seed: int) -> Arrays:
    return {name: np.square(values) for name, values in arrays(seed).items()}


def weighted_error(found: Arrays, delta: Arrays, weights: Arrays) -> float:
    lost = sum(float((weights[name] * (found[name] - delta[name]) ** 2).sum()) for name in SHAPES)
    return lost / sum(float((weights[name] * delta[name] ** 2).sum()) for name in SHAPES)


@pytest.mark.parametrize(("selector", "allocation", "feedback"), product(SELECTORS, ALLOCATIONS, FEEDBACKS))
def test_every_combination(selector: str, allocation: str, feedback: str) -> None:
    parts = SELECTORS[selector], ALLOCATIONS[allocation], FEEDBACKS[feedback]
    compressor = Compressor(MANIFEST, BASE, *parts)
    budget = 40_000 if allocation == "lossless" else 1200
    state: State | None = None
    for round in range(2):
        delta, weights = arrays(round), fisher(9)
        blob, state = compressor.compress(delta, weights, state, budget, round)
        assert len(blob) <= budget
        found = decompress(blob, MANIFEST, BASE, round)
        assert {name: values.shape for name, values in found.items()} == SHAPES
        if round == 0 and selector != "random":
            assert weighted_error(found, delta, weights) < 0.9
        if allocation == "lossless" and feedback == "none":
            assert all(np.array_equal(found[name], delta[name]) for name in SHAPES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1000), st.integers(56, 30_000), st.sampled_from(["fstq", "top-k", "paper"]), st.booleans())
def test_budget_holds(seed: int, budget: int, preset: str, informed: bool) -> None:
    compressor = Compressor.preset(preset, MANIFEST, BASE)
    delta = arrays(seed, spread=seed % 5)
    blob, _ = compressor.compress(delta, fisher(seed) if informed else None, None, budget)
    assert 56 <= len(blob) <= budget
    decompress(blob, MANIFEST)


def test_water_filling_uses_its_budget_and_beats_the_paper() -> None:
    delta, weights = arrays(0), fisher(1)
    errors = list[float]()
    for budget in (600, 1200, 2400, 4800):
        blob, _ = Compressor.preset("fstq", MANIFEST, BASE).compress(delta, weights, None, budget)
        paper, _ = Compressor.preset("paper", MANIFEST, BASE).compress(delta, weights, None, budget)
        assert len(blob) >= 0.88 * budget
        errors.append(weighted_error(decompress(blob, MANIFEST), delta, weights))
        assert errors[-1] < weighted_error(decompress(paper, MANIFEST), delta, weights)
    assert errors == sorted(errors, reverse=True)


def test_water_goes_where_the_fisher_is() -> None:
    """Two tensors with the same values: the one with the larger Fisher gets more coordinates or more bits."""
    manifest = TensorManifest((("a", (4000,)), ("b", (4000,))))
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    weights = {"a": np.full(4000, 1e-6, np.float32), "b": np.full(4000, 1e-3, np.float32)}
    blob, _ = Compressor(manifest, BASE).compress({"a": values, "b": values}, weights, None, 1500)
    found = decompress(blob, manifest)
    assert np.square(found["b"] - values).sum() < 0.5 * np.square(found["a"] - values).sum()


def test_budget_below_a_header() -> None:
    with pytest.raises(OptionError, match="56"):
        Compressor(MANIFEST, BASE).compress(arrays(0), budget=55)
    blob, state = Compressor(MANIFEST, BASE).compress(arrays(0), budget=56)
    assert len(blob) == 56 and all((values == 0).all() for values in decompress(blob, MANIFEST).values())
    assert state.residual is not None and np.array_equal(state.residual, MANIFEST.flatten(arrays(0)))


def test_lossless_raises_rather_than_leaves_out() -> None:
    compressor = Compressor.preset("lossless", MANIFEST, BASE)
    size = len(compressor.compress(arrays(0))[0])
    assert len(compressor.compress(arrays(0), budget=size)[0]) == size
    for budget in (size - 1, 56):
        with pytest.raises(OptionError, match="budget"):
            compressor.compress(arrays(0), budget=budget)


def test_error_feedback_delivers_everything_in_the_end() -> None:
    """With one delta and then zeros, the sum of what arrives approaches the delta."""
    compressor = Compressor(MANIFEST, BASE, Magnitude(), Fixed(0.1, "lloyd2"))
    delta, state = arrays(0), State()
    arrived = np.zeros(MANIFEST.parameters, np.float32)
    for round in range(40):
        given_ = delta if round == 0 else {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        blob, state = compressor.compress(given_, None, state, round=round)
        arrived += MANIFEST.flatten(decompress(blob, MANIFEST))
        assert state.residual is not None
        np.testing.assert_allclose(arrived + state.residual, MANIFEST.flatten(delta), atol=1e-8)
    assert np.abs(state.residual).max() < 0.02 * np.abs(MANIFEST.flatten(delta)).max()


def test_deterministic() -> None:
    for name in PRESETS:
        budget = None if name == "lossless" else 2000
        blobs = {Compressor.preset(name, MANIFEST, BASE).compress(arrays(3), fisher(4), None, budget)[0]
                 for _ in range(2)}  # fmt: skip
        assert len(blobs) == 1


def test_random_draws_anew_each_round() -> None:
    compressor = Compressor(MANIFEST, BASE, SELECTORS["random"], Fixed(0.1), Forget())
    first, second = (messages.decode(compressor.compress(arrays(0), round=round)[0], MANIFEST) for round in (0, 1))
    assert not np.array_equal(first.layers[0].positions[:50], second.layers[0].positions[:50])


def test_what_the_reader_expects() -> None:
    blob, _ = Compressor(MANIFEST, BASE).compress(arrays(0), budget=2000, round=4)
    with pytest.raises(MessageModelError):
        decompress(blob, MANIFEST, bytes(16), 4)
    with pytest.raises(MessageRoundError, match="round 4, expected 5"):
        decompress(blob, MANIFEST, BASE, 5)
    with pytest.raises(MessageManifestError):
        decompress(blob, TensorManifest(MANIFEST.tensors[::-1]), BASE, 4)


def test_bad_deltas() -> None:
    compressor, good = Compressor(MANIFEST, BASE), arrays(0)
    name = next(iter(SHAPES))
    bad = good[name].copy()
    bad[0, 0] = np.nan
    huge = good[name].astype(np.float64)
    huge[0, 0] = 1e300
    for delta, match in (
        ({**good, name: bad}, "NaN"),
        ({**good, name: huge}, "infinity"),
        ({**good, "more": bad}, "'more'"),
        ({key: values for key, values in good.items() if key != name}, "lacks"),
        ({**good, name: good[name].T}, r"\(96, 8\)"),
        ({**good, name: np.zeros((8, 96), np.int64)}, "int64"),
    ):
        with pytest.raises(DeltaError, match=match):
            compressor.compress(delta, budget=2000)
    with pytest.raises(DeltaError, match="negative"):
        compressor.compress(good, good, budget=2000)
    with pytest.raises(DeltaError, match="state"):
        compressor.compress(good, None, State(residual=np.zeros(3, np.float32)), 2000)
    assert decompress(
        compressor.compress(good, {k: np.zeros_like(v) for k, v in good.items()}, budget=2000)[0], MANIFEST
    )


def test_half_precision_deltas_are_read() -> None:
    delta = {name: values.astype(np.float16) for name, values in arrays(0).items()}
    blob, _ = Compressor.preset("lossless", MANIFEST, BASE).compress(delta)
    assert all(np.array_equal(values, delta[name]) for name, values in decompress(blob, MANIFEST).items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0),
        lambda: Fixed(1.5),
        lambda: Fixed(0.1, "int3"),
        lambda: Percentile((0.1,)),
        lambda: Percentile((0.9, 0.2), ("fp16", "int2")),
        lambda: Percentile((0.1, 0.2), ("fp16", "int3")),
        lambda: Compressor(MANIFEST, BASE, allocation=Percentile((0.1,) * 5, ("int2",) * 5)).compress(arrays(0)),
    ],
)
def test_bad_settings(make: object) -> None:
    with pytest.raises(OptionError):
        make()  # type: ignore[operator]


def test_bad_identity_and_round() -> None:
    for base, round in ((b"short", 0), (BASE, -1), (BASE, 2**32)):
        with pytest.raises(OptionError):
            Compressor(MANIFEST, base).compress(arrays(0), budget=2000, round=round)
    with pytest.raises(OptionError, match="budget"):
        Compressor(MANIFEST, BASE, allocation=WaterFilling()).compress(arrays(0))


def test_missing_constriction_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['constriction'] = None\n"
        "import numpy as np\nfrom fstq_infer.errors import MissingExtraError\n"
        "from fstq_infer.federated.compress import Compressor, TensorManifest\n"
        "try:\n Compressor.preset('top-k', TensorManifest((('a', (100,)),)), bytes(16)).compress("
        "{'a': np.random.default_rng(0).normal(size=100)})\n"
        "except MissingExtraError as error: print(error)\n"
        "print([name for name in ('torch', 'onnxruntime', 'flwr', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fstq-infer[federated]" in done.stdout and done.stdout.strip().endswith("[]")
