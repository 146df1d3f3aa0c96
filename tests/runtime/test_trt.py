"""fstq_infer.runtime.trt: shapes, order of calls, memory and results, on a TensorRT that computes on the CPU."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the fake computes with onnxruntime, of the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="lowering needs onnx-ir, of the 'ort' extra")

from fstq_engines.tensorrt.settings import Settings, profiles  # noqa: E402

from fstq_infer.bundle import Bundle  # noqa: E402
from fstq_infer.errors import EngineError, EngineMismatchError, ParityError  # noqa: E402
from fstq_infer.runtime import trt_buffers  # noqa: E402
from fstq_infer.runtime.cuda import Cuda  # noqa: E402
from fstq_infer.runtime.ort import OrtEngine  # noqa: E402
from fstq_infer.runtime.trt import TrtEngine  # noqa: E402
from tests.engines.tensorrt.lowered import ROWS, lowered, session  # noqa: E402
from tests.runtime import fake_tensorrt as fake  # noqa: E402

CONTEXT, PROMPT, BATCH = 150, 100, 2
ALLOCATIONS = ("cudaMalloc", "cudaMallocHost")
Make = Callable[..., tuple[TrtEngine, fake.Device, Any]]


@pytest.fixture(autouse=True)
def narrow_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_buffers, "BUCKET", 16)


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Row of the table -> session over the graph that is lowered for it."""
    graph, folder = tiny_bundle.file("model.onnx"), tmp_path_factory.mktemp("lowered")
    return {row: session(lowered(graph, row, [1, 3], room=CONTEXT), folder) for row in ROWS}


@pytest.fixture
def make(tiny_bundle: Bundle, sessions: dict[str, Any], tmp_path: Path) -> Make:
    def engine(row: str = "decomposed", device: fake.Device | None = None, **details: Any) -> Any:
        settings = Settings(CONTEXT, PROMPT, BATCH, "float32")
        ranges = profiles(settings, tiny_bundle.manifest.stages, ROWS[row])
        device = device or fake.Device()
        module = fake.module(device, lambda text: (sessions[text], ranges))
        fake.write(tmp_path, row, **details)
        return TrtEngine(tmp_path, tiny_bundle, module=module, cuda=Cuda(device)), device, module

    return engine


@pytest.fixture(scope="module")
def reference(tiny_bundle: Bundle) -> OrtEngine:
    return OrtEngine(tiny_bundle.path, tiny_bundle, threads=1)


def feed(lengths: list[int], seed: int = 0, start: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    size = max(lengths)
    ids, positions = rng.integers(0, 96, (len(lengths), size)), np.full((len(lengths), size), -1)
    for row, length in enumerate(lengths):
        positions[row, size - length :] = start + np.arange(length)
    return ids, positions


def same(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one.logits, other.logits, atol=2e-4)
    for a, b in zip(one.kept, other.kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("lengths", "keep"),
    [([60], [[60, 60]]), ([60], [[20, 9]]), ([60, 35], [[30, 20], [19, 9]]), ([50], [[-600_000, -400_000]])],
    ids=["dense", "pruned", "padded", "adaptive"],
)
def test_engines_compute_what_the_bundle_does(
    row: str, lengths: list[int], keep: list[list[int]], make: Make, reference: OrtEngine
) -> None:
    engine, device, module = make(row)
    ids, positions = feed(lengths)
    ours = engine.forward(ids, positions, np.array(keep), engine.empty_cache(len(lengths)))
    theirs = reference.forward(ids, positions, np.array(keep), reference.empty_cache(len(lengths)))
    same(ours, theirs)
    one = np.ones((len(lengths), 2), np.int64)
    before = Counter()
    for step in range(40):  # across several buckets
        if step == 1:
            before = Counter(device.calls)
        ids = np.full((len(lengths), 1), 3 + step)
        positions = np.array([[length + step] for length in lengths])
        ours = engine.forward(ids, positions, one, ours.cache)
        theirs = reference.forward(ids, positions, one, theirs.cache)
        same(ours, theirs)
    calls = Counter(device.calls) - before
    assert not any(calls[name] for name in ALLOCATIONS)  # no token allocates
    decode = module.plans[0].contexts[1]
    assert calls["cudaGraphLaunch"] > 25 and calls["cudaGraphLaunch"] + len(decode.runs) >= 39
    assert all(shapes["input_ids"][1] == 1 for shapes in decode.runs)
    assert all(shapes["input_ids"][1] > 1 for shapes in module.plans[0].contexts[0].runs)


@pytest.mark.parametrize("row", ["decomposed", "cache update"])
def test_caches_are_continued_in_several_ways(row: str, make: Make, reference: OrtEngine) -> None:
    results = []
    for engine in (make(row)[0], reference):
        keep, one = np.array([[20, 9]]), np.ones((1, 2), np.int64)
        first = engine.forward(*feed([40]), keep, engine.empty_cache(1))
        logits = []
        for token in (5, 6):  # both go on from the same cache
            step = engine.forward(np.array([[token]]), np.array([[40]]), one, first.cache)
            logits.append(step.logits.copy())
        turn = engine.forward(*feed([30], 1, 41), np.array([[30, 30]]), step.cache)  # a second turn
        logits.append(turn.logits.copy())
        again = engine.forward(np.array([[7]]), np.array([[40]]), one, first.cache)
        logits.append(again.logits.copy())
        results.append(np.concatenate(logits))
    np.testing.assert_allclose(results[0], results[1], atol=2e-4)


def test_a_second_prompt_uses_the_memory_of_the_first(make: Make) -> None:
    engine, device, _ = make()
    keep = np.array([[20, 9]])
    engine.forward(*feed([40]), keep, engine.empty_cache(1))
    before = Counter(device.calls)
    step = engine.forward(*feed([50], 1), keep, engine.empty_cache(1))
    assert not any((Counter(device.calls) - before)[name] for name in ALLOCATIONS)
    assert step.cache.bytes > 0 == engine.empty_cache(1).bytes
    assert step.cache.bytes == sum(2 * n * 2 * 8 * 4 for n in (50, 20, 20, 9))  # 2 heads of 8; what stayed, by layer
    held = engine.forward(*feed([50], 1), keep, engine.empty_cache(1))  # while the other is held: new memory
    assert held.cache.buffers is not step.cache.buffers


def test_interleaved_conversations_are_what_each_is_alone(make: Make) -> None:
    alone, (together, device, _) = make()[0], make()
    keep, one = np.array([[20, 9]]), np.ones((1, 2), np.int64)

    def begun(engine: TrtEngine) -> list[Any]:
        return [engine.forward(*feed([40], seed), keep, engine.empty_cache(1)) for seed in (0, 1)]

    def token(engine: TrtEngine, which: int, number: int, step: Any) -> Any:
        return engine.forward(np.array([[3 + which + number]]), np.array([[40 + number]]), one, step.cache)

    wanted = begun(alone)
    logits: list[list[Any]] = [[], []]
    for which in (0, 1):
        for number in range(24):
            wanted[which] = token(alone, which, number, wanted[which])
            logits[which].append(wanted[which].logits.copy())
    steps = begun(together)
    for number in range(24):
        for which in (0, 1):
            steps[which] = token(together, which, number, steps[which])
            np.testing.assert_allclose(steps[which].logits, logits[which][number], atol=2e-4)
    assert device.calls.count("cudaGraphLaunch") > 24  # either has a graph of its own
    for number in range(24, 30):  # one goes on alone
        for which, engine, held in ((0, alone, wanted), (0, together, steps)):
            held[which] = token(engine, which, number, held[which])
        np.testing.assert_allclose(steps[0].logits, wanted[0].logits, atol=2e-4)


def test_a_graph_that_cannot_be_captured_is_an_engine_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, device, _ = make()
    one = np.ones((1, 2), np.int64)
    step = engine.forward(*feed([40]), np.array([[20, 9]]), engine.empty_cache(1))
    step = engine.forward(np.array([[3]]), np.array([[40]]), one, step.cache)
    monkeypatch.setattr(fake.Context, "execute_async_v3", lambda *_: False)
    with pytest.raises(EngineError, match="while a CUDA graph"):
        for position in (41, 42):
            step = engine.forward(np.array([[3]]), np.array([[position]]), one, step.cache)
    assert device.recording is None and not device.graphs


def test_all_memory_is_given_back(make: Make) -> None:
    engine, device, _ = make()
    step = engine.forward(*feed([40]), np.array([[20, 9]]), engine.empty_cache(1))
    held = [step]
    for number in range(6):
        step = engine.forward(np.array([[3]]), np.array([[40 + number]]), np.ones((1, 2), np.int64), step.cache)
    held.append(engine.forward(*feed([50], 1), np.array([[20, 9]]), engine.empty_cache(1)))
    assert device.graphs and device.streams == 1
    before, logits = len(device.memory), held[0].logits
    held.clear()
    del step
    engine.empty_cache(2)
    assert len(device.memory) < before  # buffers that neither the pool nor a cache needs
    before = logits.copy()
    del engine
    gc.collect()
    assert not device.graphs and not device.streams and len(device.memory) == 1  # logits that are still held
    np.testing.assert_array_equal(logits, before)
    del logits
    assert not device.memory


def test_what_an_engine_is_not_built_for_is_refused(make: Make) -> None:
    engine, _, _ = make()
    keep = np.array([[20, 9]])
    assert engine.max_positions == CONTEXT and engine.vocab_size == 96 and len(engine.stages) == 2
    with pytest.raises(EngineError, match=r"3 rows .* built for 1 to 2.*--batch"):
        engine.empty_cache(3)
    with pytest.raises(EngineError, match=r"101 tokens is longer than the 100.*--prompt 101"):
        engine.forward(*feed([101]), keep, engine.empty_cache(1))
    full = engine.forward(*feed([100]), np.array([[100, 100]]), engine.empty_cache(1))
    with pytest.raises(EngineError, match=r"160 tokens would be cached.*built for 150.*--context 160"):
        engine.forward(*feed([60]), np.array([[60, 60]]), full.cache)
    with pytest.raises(EngineError, match="do not fit a cache of 2 rows"):
        engine.forward(*feed([60]), keep, engine.empty_cache(2))
    with pytest.raises(EngineError, match="keep has the shape"):
        engine.forward(*feed([60]), np.array([[1]]), engine.empty_cache(1))
    with pytest.raises(EngineError, match="not of this engine"):
        engine.forward(*feed([60]), keep, make()[0].empty_cache(1))


def test_another_version_or_gpu_names_both_sides_and_the_command(make: Make) -> None:
    with pytest.raises(
        EngineMismatchError, match=r"10\.16\.0 for SM 86, here are 10\.3\.0 and SM 86.*fstq build .*--force"
    ):
        make(tensorrt="10.16.0")
    with pytest.raises(EngineMismatchError, match=r"for SM 86, here are 10\.3\.0 and SM 87.*--backend tensorrt"):
        make(device=fake.Device(87))


def test_a_plan_that_does_not_deserialize_is_an_error(make: Make, tmp_path: Path, tiny_bundle: Bundle) -> None:
    _, device, module = make()
    (tmp_path / "model.plan").write_bytes(b"")
    with pytest.raises(EngineError, match=r"does not deserialize.*Rebuild it with: fstq build"):
        TrtEngine(tmp_path, tiny_bundle, module=module, cuda=Cuda(device))
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(EngineError, match="holds no engine"):
        TrtEngine(tmp_path, tiny_bundle, module=module, cuda=Cuda(device))


@pytest.mark.parametrize(
    ("call", "code"), [("cudaMalloc", 2), ("cudaMemcpyAsync", 719), ("cudaStreamSynchronize", 700)]
)
def test_what_cuda_reports_is_an_engine_error(call: str, code: int, make: Make) -> None:
    engine, device, _ = make()
    device.fails = {call: code}
    with pytest.raises(EngineError, match=f"{call} failed: {code}"):
        engine.forward(*feed([40]), np.array([[20, 9]]), engine.empty_cache(1))


def test_an_engine_that_is_built_on_a_gpu_is_compared_with_its_bundle(
    make: Make, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fstq_engines.tensorrt import build, gpu, module

    engine, _, fake_module = make()
    settings = Settings(CONTEXT, PROMPT, BATCH, "float32")
    trt = module.TensorRT(fake_module, "tensorrt", "10.3.0")
    plan = build.Plan(tiny_bundle, trt, gpu.Gpu("Orin", 87, "12.6"), None, settings, None, None)
    monkeypatch.setattr("fstq_infer.runtime.trt.TrtEngine", lambda *_, **__: engine)
    found = build._compare(plan, tmp_path, 1, lambda _: None)
    assert found["checked"] and 0 < found["difference"] < 1e-4 and "padded batch" in found["cases"]
    loaded = engine._prefill.context.plan
    monkeypatch.setattr(loaded, "session", Wrong(loaded.session))
    with pytest.raises(ParityError, match="other logits"):
        build._compare(plan, tmp_path, 1, lambda _: None)


class Wrong:
    """A session whose logits are a little off."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        made = self.session.run(names, feeds)
        return [value + np.float32(0.1) * (name == "logits") for name, value in zip(names, made, strict=True)]


def test_cuda_is_described_and_its_absence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from fstq_engines.tensorrt import gpu

    assert Cuda(fake.Device(87)).architecture() == 87

    def nothing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", nothing)
    with pytest.raises(EngineError, match=r"cuda-python.*fstq-infer\[tensorrt\]"):
        Cuda.load()
    assert gpu.this_gpu() is None
