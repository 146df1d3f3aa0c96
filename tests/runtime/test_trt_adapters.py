"""fstq_infer.runtime.trt_adapters: adapters given to a TensorRT that computes on the CPU, beside ONNX Runtime."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the fake computes with onnxruntime, of the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="lowering needs onnx-ir, of the 'ort' extra")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 is compared with ml_dtypes', of the 'export' extra")

from fstq_engines import parity  # noqa: E402
from fstq_engines.tensorrt import lowering, memory  # noqa: E402
from fstq_engines.tensorrt.settings import Settings, profiles  # noqa: E402
from hypothesis import given as over  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fstq_infer.adapters import tensors  # noqa: E402
from fstq_infer.adapters.store import Adapter  # noqa: E402
from fstq_infer.bundle import Bundle  # noqa: E402
from fstq_infer.errors import EngineError  # noqa: E402
from fstq_infer.runtime import trt_adapters, trt_buffers  # noqa: E402
from fstq_infer.runtime.cuda import Cuda  # noqa: E402
from fstq_infer.runtime.ort import OrtEngine  # noqa: E402
from fstq_infer.runtime.trt import TrtEngine  # noqa: E402
from fstq_infer.runtime.trt_ports import Matrix  # noqa: E402
from tests.conftest import HEADS, STAGES, WIDTH  # noqa: E402
from tests.engines.tensorrt.lowered import ROWS, session  # noqa: E402
from tests.runtime import fake_tensorrt as fake  # noqa: E402

CONTEXT, PROMPT, BATCH, RANK = 150, 100, 2, 8
HALF = "half precision"
Make = Callable[..., tuple[TrtEngine, fake.Device, Any]]


@pytest.fixture(autouse=True)
def narrow_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_buffers, "BUCKET", 16)


@pytest.fixture(scope="module")
def bundle(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from fstq_export.passes.pruning import PruneStage

    from fstq_infer.fisher.probe import Probe
    from tests.engines.tensorrt.adapted import adapted_bundle

    stages = [PruneStage(stage, Probe(WIDTH, HEADS).arrays()) for stage in STAGES]
    return adapted_bundle(tiny_graph / "hf", tmp_path_factory.mktemp("adapted"), stages, RANK)


@pytest.fixture(scope="module")
def plans(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Row of the table -> session over the graph that is lowered for it, and the bundle's probes."""
    made = {}
    for row, kind in (*((row, "float32") for row in ROWS), ("decomposed", "float16")):
        model = ir.load(bundle.file("model.onnx"))
        probes = [value.name for value in lowering.replaceable(model)]
        model = lowering.lower(model, ROWS[row], [s.layer for s in STAGES], "float32", kind, CONTEXT)
        defaults = lowering.free(model, probes)
        name = row if kind == "float32" else HALF
        made[name] = session(model, tmp_path_factory.mktemp("lowered")), tensors.encode(defaults)
    return made


@pytest.fixture
def make(bundle: Bundle, plans: dict[str, Any], tmp_path: Path) -> Make:
    def engine(row: str = "decomposed", rank: int = RANK) -> Any:
        settings = Settings(CONTEXT, PROMPT, BATCH, "float32", rank=rank)
        ranges = profiles(settings, STAGES, ROWS.get(row, ROWS["decomposed"]), adapters=True)
        device = fake.Device()
        module = fake.module(device, lambda text: (plans[text][0], ranges))
        fake.write(tmp_path, row)
        (tmp_path / trt_adapters.PROBES).write_bytes(plans[row][1])
        return TrtEngine(tmp_path, bundle, module=module, cuda=Cuda(device)), device, module

    return engine


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> OrtEngine:
    return OrtEngine(bundle.path, bundle, threads=1)


def random(bundle: Bundle, seed: int, rank: int, probes: bool = False, part: str = "") -> Adapter:
    """part: of the names of the layers that it changes."""
    rng, lora = np.random.default_rng(seed), bundle.manifest.lora
    assert lora is not None
    arrays: dict[str, Any] = {}
    for one in lora.linears:
        if part in one.name:
            a, b = one.ports
            arrays[a] = (rng.normal(size=(one.inputs, rank)) * one.inputs**-0.5).astype(np.float32)
            arrays[b] = (rng.normal(size=(rank, one.outputs)) * 0.3).astype(np.float32)
    if probes:
        own = parity.random_adapter(lora, "float32", probes=True).arrays
        arrays |= {name: own[name] for name in lora.probes}
    return Adapter(f"random {seed}", arrays, probes, None)


@pytest.mark.parametrize("row", ROWS)
def test_engines_with_adapters_compute_what_the_bundle_does(
    row: str, bundle: Bundle, make: Make, reference: OrtEngine
) -> None:
    engine, device, _ = make(row)
    lora = bundle.manifest.lora
    assert lora is not None and lora.probes
    cases = parity.cases(bundle.manifest.model, STAGES)
    every = cases + parity.adapted(cases, lora, "float32")
    names = [case.name for case in every]
    assert len(names) == 11 and {"dense, adapter", "pruned, adapter with probes"} < set(names)
    expected = parity.run(reference, every)
    found = parity.compare(every, expected, parity.run(engine, every), "float32")
    assert found.difference < 2e-4
    for case, output in zip(every, expected, strict=True):
        if case.adapters:
            alone = expected[names.index(case.name.split(",")[0])]
            assert np.abs(output.logits[0][-1] - alone.logits[0][-1]).max() > 0.1
        if "probes" in case.name:
            assert not all(map(np.array_equal, output.kept, alone.kept))
    assert device.calls.count("cudaGraphLaunch")


def test_half_precision_stays_near(bundle: Bundle, make: Make, reference: OrtEngine) -> None:
    engine, lora = make(HALF)[0], bundle.manifest.lora
    assert lora is not None and {one.kind for one in engine.ports.loras} == {"HALF"}
    assert {one.kind for one in engine.ports.probes} == {"FLOAT"}
    cases = parity.adapted(parity.cases(bundle.manifest.model, STAGES)[:1], lora, "float32")
    expected, found = parity.run(reference, cases), parity.run(engine, cases)
    apart = max(
        float(np.abs(a - b).max() / max(1.0, a.std()))
        for one, other in zip(expected, found, strict=True)
        for a, b in zip(one.logits, other.logits, strict=True)
    )
    assert 1e-5 < apart < 5e-2


def test_rows_with_adapters_of_their_own(bundle: Bundle, make: Make, reference: OrtEngine) -> None:
    """One of less rank that changes some layers only, beside one of the largest rank."""
    small, large = random(bundle, 1, 2, part="q_proj"), random(bundle, 2, RANK)
    rng = np.random.default_rng(0)
    ids, positions = rng.integers(0, 96, (2, 30)), np.tile(np.arange(30), (2, 1))
    keep, results = np.array([[15, 9], [15, 9]]), []
    for engine in (make()[0], reference):
        for rows in ((small, large), (large, small), (None, small), (large, large)):
            one = engine.adapted(rows)
            step = one.forward(ids, positions, keep, one.empty_cache(2))
            results.append(step.logits.copy())
            step = one.forward(ids[:, :1], positions[:, :1] + 30, np.ones_like(keep), step.cache)
            results.append(step.logits.copy())
    half = len(results) // 2
    np.testing.assert_allclose(results[:half], results[half:], atol=2e-4)


def test_switching_uploads_nothing_again_and_never_uses_another_ones_graph(
    bundle: Bundle, make: Make, reference: OrtEngine
) -> None:
    engine, device, _ = make()
    adapters, tokens = [random(bundle, seed, 3) for seed in range(2)], np.array([[5]])
    ids, positions = np.arange(3, 33)[None], np.arange(30)[None]
    keep, one = np.array([[15, 9]]), np.ones((1, 2), np.int64)
    steps = {}
    for backend in (engine, reference):
        for index, adapter in enumerate(adapters):
            chosen = backend.adapted([adapter])
            steps[backend, index] = chosen.forward(ids, positions, keep, chosen.empty_cache(1))
    before = Counter(device.calls)
    for number in range(6):
        for index, adapter in enumerate(adapters):
            logits = []
            for backend in (engine, reference):
                step = backend.adapted([adapter]).forward(
                    tokens, tokens * 0 + 30 + number, one, steps[backend, index].cache
                )
                steps[backend, index] = step
                logits.append(step.logits.copy())
            np.testing.assert_allclose(*logits, atol=2e-4)
    calls = Counter(device.calls) - before
    assert not calls["cudaMalloc"] and calls["cudaGraphLaunch"] >= 6
    step = engine.forward(tokens, tokens * 0 + 36, one, steps[engine, 0].cache)  # without one: another graph
    want = reference.forward(tokens, tokens * 0 + 36, one, steps[reference, 0].cache)
    np.testing.assert_allclose(step.logits, want.logits, atol=2e-4)


def test_memory_of_adapters_is_bounded_and_given_back(bundle: Bundle, make: Make) -> None:
    engine, device, _ = make()
    before, held = len(device.memory), []
    for seed in range(trt_adapters.REMEMBERED + 3):
        held.append(random(bundle, seed, 1))
        engine.adapted([held[-1]])
    assert len(device.memory) == before + trt_adapters.REMEMBERED
    del engine
    gc.collect()
    assert not device.memory


@pytest.mark.parametrize("row", ["decomposed", "cache update"])
def test_the_estimate_of_a_build_covers_what_is_allocated(row: str, bundle: Bundle, make: Make) -> None:
    model = ir.load(bundle.file("model.onnx"))
    probes = [value.name for value in lowering.replaceable(model)]
    lowering.lower(model, ROWS[row], [s.layer for s in STAGES], "float32", "float32", CONTEXT)
    own = sum(array.nbytes for array in lowering.free(model, probes).values())
    asked = Settings(CONTEXT, PROMPT, BATCH, "float32", rank=RANK)
    expected = memory.estimate(model, bundle.manifest.model, asked)
    engine, device, _ = make(row)

    def allocated() -> int:
        return sum(len(block) for block in device.memory.values())

    before, held = allocated(), []
    for seed in range(0, 2 * trt_adapters.REMEMBERED + 2, 2):
        held.append((random(bundle, seed, RANK), random(bundle, seed + 1, RANK)))
        engine.adapted(held[-1])
    inputs = len(engine.ports.loras) + len(engine.ports.probes)
    least, alignment = trt_adapters.REMEMBERED * expected.adapters, trt_adapters.ALIGNED * inputs
    grown = allocated() - before
    assert 0 < least <= grown <= least + trt_adapters.REMEMBERED * (own + alignment)
    before = allocated()
    step = engine.forward(
        np.ones((2, 9), np.int64), np.tile(np.arange(9), (2, 1)), np.full((2, 2), 9), engine.empty_cache(2)
    )
    assert expected.caches <= allocated() - before <= expected.caches + expected.scratch
    assert step.logits.shape == (2, 96)


def test_what_does_not_fit_an_engine_is_refused(bundle: Bundle, make: Make, tmp_path: Path) -> None:
    engine, _, _ = make(rank=4)
    assert engine.adapted([None, None]) is engine
    with pytest.raises(EngineError, match=r"'random 0' has rank 5, .*at most 4\. .*--rank 5"):
        engine.adapted([random(bundle, 0, 5)])
    with pytest.raises(EngineError, match="3 rows have adapters, the engine was built for 2"):
        engine.adapted([random(bundle, 0, 1), None, None])
    with pytest.raises(EngineError, match="different probes cannot share a batch"):
        engine.adapted([random(bundle, 0, 1, probes=True), None])
    both = engine.adapted([random(bundle, 0, 1), None])
    assert (both.stages, both.vocab_size, both.max_positions) == (engine.stages, engine.vocab_size, CONTEXT)
    with pytest.raises(EngineError, match="2 rows have adapters, but there are 1 rows"):
        both.empty_cache(1)
    assert both.adapted([None]) is engine
    odd = random(bundle, 0, 1)
    name = next(iter(odd.arrays))
    with pytest.raises(EngineError, match=r"does not fit the engine: lora\..*\(5, 1\)"):
        engine.adapted([replace(odd, arrays=dict(odd.arrays) | {name: np.zeros((5, 1), np.float32)})])
    path = tmp_path / trt_adapters.PROBES
    for content, says in ((b"nothing", "is damaged"), (tensors.encode({}), "does not hold the probes")):
        path.write_bytes(content)
        with pytest.raises(EngineError, match=f"{says}.*[Bb]uild the engine again"):
            trt_adapters.Matrices(engine.cuda, None, engine.ports, tmp_path)


def test_an_engine_without_inputs_says_how_to_get_them(make: Make, tmp_path: Path) -> None:
    engine, _, _ = make()
    plain = replace(engine.ports, loras=(), probes=(), rank=0)
    found = trt_adapters.Matrices(engine.cuda, None, plain, tmp_path)
    with pytest.raises(EngineError, match=r"no inputs for adapters\..*--adapter"):
        found.bound([Adapter("x", {}, False, None)])


@over(
    st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**127), max_value=2.0**127), min_size=1, max_size=20)
)
def test_bfloat16_is_rounded_to_the_nearest_even(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    found = trt_adapters.converted(array, Matrix("lora.x.A", (len(array),), "BF16"), "it")
    np.testing.assert_array_equal(found, array.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize(("kind", "number"), [("HALF", 1e5), ("BF16", 3.4e38)])
def test_numbers_that_half_precision_cannot_hold_are_named(kind: str, number: float) -> None:
    with pytest.raises(EngineError, match=r"adapter 'x' has weights that are too large for lora\.y\.B"):
        trt_adapters.converted(np.array([number], np.float32), Matrix("lora.y.B", (1,), kind), "adapter 'x'")
