"""fstq_infer.runtime.ort and load: the engine against its own graph, in pieces, in batches, and with wrong inputs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")

from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError, MissingExtraError, OptionError
from fstq_infer.runtime import ort as module
from fstq_infer.runtime import ort_caches
from fstq_infer.runtime.engine import Int64, Stage, Step
from fstq_infer.runtime.load import build_engine, open_engine
from fstq_infer.runtime.ort import OrtEngine
from fstq_infer.runtime.ort_caches import ROOM, SharedCache


@pytest.fixture(scope="module", params=["bundle", "engine"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> OrtEngine:
    """The bundle's own graph, which copies its cache, and the one built from it, which writes in place."""
    path = tiny_bundle.path
    if request.param == "engine":
        path = build_engine(tiny_bundle, directory=tmp_path_factory.mktemp("built") / "engine")
    return OrtEngine(path, tiny_bundle, threads=1)


def tokens(count: int, rows: int = 1, seed: int = 0) -> Int64:
    return np.random.default_rng(seed).integers(3, 96, (rows, count), np.int64)


def call(engine: OrtEngine, ids: Int64, keep: Any = None, cache: Any = None, start: int = 0) -> Step:
    """Feed unpadded rows; keep: per row and stage, default dense."""
    rows, count = ids.shape
    positions = np.tile(np.arange(start, start + count), (rows, 1))
    wanted = np.full((rows, len(engine.stages)), count) if keep is None else np.broadcast_to(keep, (rows, 2))
    step = engine.forward(ids, positions, wanted, engine.empty_cache(rows) if cache is None else cache)
    return replace(step, logits=step.logits.copy())


def holds(cache: Any, *columns: int) -> bool:
    """Whether the cache holds so many tokens in each group of layers (1, 2 and 1 of them), and little beside."""
    used = 2 * (columns[0] + 2 * columns[1] + columns[2]) * 2 * 8 * 4  # k and v, tokens x heads x width x bytes
    if isinstance(cache, SharedCache):
        return cache.lengths == columns and used < cache.bytes <= used + 2 * 4 * 2 * ROOM * 2 * 8 * 4
    return bool(cache.bytes == used)


def test_properties(engine: OrtEngine, tiny_bundle: Bundle) -> None:
    assert engine.stages == (Stage(1, 1, 4), Stage(3, 2, 3))
    assert (engine.max_positions, engine.vocab_size) == (160, 96)
    step = call(engine, tokens(9, rows=2))
    assert step.logits.shape == (2, 96) and step.logits.dtype == np.float32
    assert step.logits.std() > 0.1


def test_decoding_from_the_cache_equals_one_long_prefill(engine: OrtEngine) -> None:
    ids = tokens(40)
    step = call(engine, ids[:, :30])
    for place in range(30, 40):
        step = call(engine, ids[:, place : place + 1], [1, 1], step.cache, place)
        whole = call(engine, ids[:, : place + 1])
        np.testing.assert_allclose(step.logits, whole.logits, atol=1e-4)
    assert holds(step.cache, 40, 40, 40) and holds(whole.cache, 40, 40, 40)


def test_a_prompt_in_two_calls_equals_one(engine: OrtEngine) -> None:
    ids = tokens(40)
    first = call(engine, ids[:, :17])
    second = call(engine, ids[:, 17:], cache=first.cache, start=17)
    np.testing.assert_allclose(second.logits, call(engine, ids).logits, atol=1e-4)


def test_pruning_keeps_sink_window_and_as_many_as_asked(engine: OrtEngine) -> None:
    ids = tokens(40)
    step = call(engine, ids, [20, 12])
    first, second = (kept[0].tolist() for kept in step.kept)
    assert (len(first), len(second)) == (20, 12)
    assert first == sorted(set(first)) and second == sorted(set(second)) and set(second) <= set(first)
    assert {0, 36, 37, 38, 39} <= set(first) and {*first[:2], *first[-3:]} <= set(second)
    assert holds(step.cache, 40, 20, 12)  # layer 0 sees all tokens, 1 and 2 the first stage's, 3 the second's
    dense = call(engine, ids)
    assert [kept[0].tolist() for kept in dense.kept] == [list(range(40))] * 2
    assert np.abs(dense.logits - step.logits).max() > 1e-3
    for place in range(40, 43):  # decoding goes on from a pruned cache, at the unpruned position
        step = call(engine, ids[:, :1], [1, 1], step.cache, place)
        assert [kept.tolist() for kept in step.kept] == [[[0]], [[0]]]


def test_rows_of_a_padded_batch_equal_single_runs(engine: OrtEngine) -> None:
    long, short = tokens(40)[0], tokens(23, seed=1)[0]
    keeps = np.array([[22, 12], [15, 9]])
    ids, positions = np.zeros((2, 40), np.int64), np.full((2, 40), -1)
    ids[0], ids[1, 17:] = long, short
    positions[0], positions[1, 17:] = np.arange(40), np.arange(23)
    batch = engine.forward(ids, positions, keeps, engine.empty_cache(2))
    singles = [call(engine, row[None], keep) for row, keep in zip((long, short), keeps, strict=True)]
    for step_number in range(4):
        for row, single in enumerate(singles):
            np.testing.assert_allclose(batch.logits[row], single.logits[0], atol=1e-4)
            if step_number == 0:
                for stage in range(2):
                    kept = batch.kept[stage][row]
                    assert (kept[kept >= 0] - 17 * row).tolist() == single.kept[stage][0].tolist()
        ids = tokens(1, rows=2, seed=step_number + 5)
        places = np.array([[40 + step_number], [23 + step_number]])
        batch = engine.forward(ids, places, np.ones((2, 2), np.int64), batch.cache)
        singles = [
            call(engine, ids[row : row + 1], [1, 1], single.cache, int(places[row, 0]))
            for row, single in enumerate(singles)
        ]


def test_a_cache_is_immutable_and_outlives_later_calls(engine: OrtEngine) -> None:
    start = call(engine, tokens(20), [10, 8])
    before = call(engine, tokens(1, seed=2), [1, 1], start.cache, 20)
    kept, logits = start.kept[0].copy(), before.logits.copy()
    for seed in range(20):
        call(engine, tokens(30, seed=seed))
        call(engine, tokens(1, seed=seed), [1, 1], start.cache, 20)
    after = call(engine, tokens(1, seed=2), [1, 1], start.cache, 20)
    assert np.array_equal(after.logits, logits) and np.array_equal(before.logits, logits)
    assert np.array_equal(start.kept[0], kept)


def test_buffers_grow_fork_and_shrink(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engine = OrtEngine(build_engine(tiny_bundle, directory=tmp_path / "engine"), tiny_bundle, threads=1)
    ids = tokens(150)
    start = step = call(engine, ids[:, :20])
    first, places = start.cache.buffers, set()
    for place in range(20, 150):
        step = call(engine, ids[:, place : place + 1], [1, 1], step.cache, place)
        places.add(id(step.cache.buffers))
    assert step.cache.lengths == (150,) * 3 and len(places) == 3  # of 84, 149 and 214 columns
    assert step.cache.buffers.sizes == (150 + ROOM,) * 3
    np.testing.assert_allclose(step.logits, call(engine, ids).logits, atol=1e-4)
    # From an older cache: its buffers go on to serve the newer one.
    other = call(engine, ids[:, 20:40], cache=start.cache, start=20)
    assert other.cache.buffers is not first and start.cache.buffers is first
    np.testing.assert_allclose(other.logits, call(engine, ids[:, :40]).logits, atol=1e-4)


def test_columns_for_tokens_that_did_not_stay_are_given_back(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_caches, "ROOM", 8)
    engine = OrtEngine(build_engine(tiny_bundle, directory=tmp_path / "engine"), tiny_bundle, threads=1)
    step = call(engine, tokens(150), [-400_000, -1])  # a share of the score mass may keep every token
    lengths = step.cache.lengths
    assert lengths[0] == 150 and max(lengths[1:]) < 100
    assert step.cache.buffers.sizes == (150 + 9, *(n + 8 for n in lengths[1:]))


@pytest.mark.parametrize("count", [1, 20])
def test_arrays_are_read_at_each_call_and_may_be_written_afterwards(engine: OrtEngine, count: int) -> None:
    ids, positions, keep = tokens(count), np.arange(count)[None], np.full((1, 2), count)
    rows = [tokens(count, seed=seed) for seed in range(3)]
    expected = [call(engine, row) for row in rows]
    for row, wanted in zip(rows, expected, strict=True):  # the same arrays with other content
        ids[:], positions[:] = row, np.arange(count)
        step = engine.forward(ids, positions, keep, engine.empty_cache(1))
        ids[:], positions[:] = 0, -1
        np.testing.assert_allclose(step.logits, wanted.logits, atol=1e-5)
        follow, after = (call(engine, tokens(1), [1, 1], one.cache, count) for one in (step, wanted))
        np.testing.assert_allclose(follow.logits, after.logits, atol=1e-5)
    strided = np.repeat(rows[0], 2, axis=1)[:, ::2]
    narrow = rows[1].astype(np.int32)
    for given, wanted in ((strided, expected[0]), (narrow, expected[1]), (strided, expected[0])):
        step = engine.forward(given, np.arange(count)[None], keep, engine.empty_cache(1))
        np.testing.assert_allclose(step.logits, wanted.logits, atol=1e-5)


def test_a_single_padding_token_is_not_kept(engine: OrtEngine) -> None:
    step = engine.forward(tokens(1, 2), np.array([[-1], [0]]), np.ones((2, 2), np.int64), engine.empty_cache(2))
    assert [kept.tolist() for kept in step.kept] == [[[-1], [0]]] * 2


def test_empty_caches_are_shared(engine: OrtEngine) -> None:
    assert engine.empty_cache(3) is engine.empty_cache(3)
    assert engine.empty_cache(3).bytes == 0
    with pytest.raises(EngineError, match="at least one row"):
        engine.empty_cache(0)


def test_arrays_of_any_layout_and_integer_type(engine: OrtEngine) -> None:
    ids = tokens(20, rows=2)
    expected = call(engine, ids)
    assert np.array_equal(call(engine, np.asfortranarray(ids)).logits, expected.logits)
    assert np.array_equal(call(engine, ids.astype(np.int32)).logits, expected.logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((2, 5), (2, 5), (2, 2)), "do not fit a cache of 1 rows"),
        (((1, 5), (1, 4), (1, 2)), "do not fit"),
        (((1, 0), (1, 0), (1, 2)), "do not fit"),
        (((5,), (5,), (1, 2)), "do not fit"),
        (((1, 5), (1, 5), (1, 1)), r"keep has the shape \(1, 1\), expected \(1, 2\)"),
    ],
)
def test_shapes_that_do_not_fit(engine: OrtEngine, shapes: Any, match: str) -> None:
    with pytest.raises(EngineError, match=match):
        engine.forward(*(np.zeros(shape, np.int64) for shape in shapes), engine.empty_cache(1))


def test_a_foreign_cache_is_refused(engine: OrtEngine, tiny_bundle: Bundle) -> None:
    other = OrtEngine(tiny_bundle.path, tiny_bundle, threads=1)
    with pytest.raises(EngineError, match="not of this engine"):
        call(engine, tokens(3), cache=other.empty_cache(1))


def test_an_error_inside_is_reported_and_leaves_the_engine_usable(
    engine: OrtEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = call(engine, tokens(5)).logits
    with pytest.raises(EngineError, match=r"failed on 1 x 5 tokens: .*out of data bounds"):
        call(engine, tokens(5), start=100_000)
    assert np.array_equal(call(engine, tokens(5)).logits, expected)


def test_loading_and_running_writes_nothing_to_stderr(tiny_bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    call(OrtEngine(tiny_bundle.path, tiny_bundle), tokens(5))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stages", "model", "match"),
    [
        ((), {}, r"0 pruning stages.*input keep is not expected.*input past_positions.1 is not expected"),
        ((Stage(1, 1, 4),), {}, r"past_positions.2 is not expected.*output kept_indices.2 is not expected"),
        (None, {"layers": 5}, r"past_key_values.4.key is missing.*output present.4.value is missing"),
        (None, {"vocab_size": 97}, r"logits is .*96\], expected 97 columns"),
    ],
)
def test_a_graph_that_its_manifest_does_not_describe(
    tiny_graph: Path, tmp_path: Path, stages: Any, model: Any, match: str
) -> None:
    from tests.conftest import STAGES, write_bundle

    bundle = write_bundle(tmp_path / "b", tiny_graph, STAGES if stages is None else stages, **model)
    with pytest.raises(EngineError, match=match):
        OrtEngine(bundle.path, bundle)


def save_graph(path: Path, cache: tuple[int, str, Any, Any], ids: tuple[int, int] = (7, 2)) -> None:
    """A graph with the names of contract 1 for one layer without stages. cache: rank, type, heads, width."""
    onnx = pytest.importorskip("onnx", reason="needs the 'export' extra")
    helper, rank = onnx.helper, cache[0]
    kind = getattr(onnx.TensorProto, cache[1])
    past = ["batch", cache[2], "past", cache[3]][:rank]
    value = helper.make_tensor_value_info
    names = {"past_positions.0": "present_positions.0"}
    names |= {f"past_key_values.0.{part}": f"present.0.{part}" for part in ("key", "value")}
    inputs = [value("input_ids", ids[0], ["b", "s"][: ids[1]]), value("position_ids", 7, ["b", "s"])]
    outputs, nodes = [value("logits", 1, ["b", 1, 96])], []
    for old, new in names.items():
        inputs.append(value(old, *((7, ["b", "p"]) if "positions" in old else (kind, past))))
        outputs.append(value(new, *((7, ["b", "t"]) if "positions" in new else (kind, past))))
        nodes.append(helper.make_node("Identity", [old], [new]))
    nodes.append(helper.make_node("RandomNormal", [], ["logits"], shape=[1, 1, 96]))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    path.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path / "model.onnx")


@pytest.mark.parametrize(
    ("cache", "ids", "match"),
    [
        ((4, "DOUBLE", 2, 8), (7, 2), r"past_key_values.0.key is tensor\(double\).*expected tensor\(float\) or"),
        ((3, "FLOAT", 2, 8), (7, 2), r"past_key_values.0.value .* of rank 4"),
        ((4, "FLOAT", "heads", 8), (7, 2), "expected fixed numbers of heads and of their width"),
        ((4, "FLOAT", 2, 8), (6, 2), r"input input_ids is tensor\(int32\)"),
        ((4, "FLOAT", 2, 8), (7, 1), r"input input_ids .* of rank 2"),
    ],
)
def test_a_graph_with_wrong_types_or_ranks(tmp_path: Path, cache: Any, ids: Any, match: str) -> None:
    from tests.conftest import write_bundle

    save_graph(tmp_path / "graph", cache, ids)
    bundle = write_bundle(tmp_path / "b", tmp_path / "graph", (), layers=1)
    with pytest.raises(EngineError, match=match):
        OrtEngine(bundle.path, bundle)


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_caches_of_all_float_types(tmp_path: Path, kind: str) -> None:
    from tests.conftest import write_bundle

    save_graph(tmp_path / "graph", (4, kind, 2, 8))
    bundle = write_bundle(tmp_path / "b", tmp_path / "graph", (), layers=1)
    engine = OrtEngine(bundle.path, bundle)
    ids = np.zeros((1, 3), np.int64)
    step = engine.forward(ids, ids, np.zeros((1, 0), np.int64), engine.empty_cache(1))
    assert step.logits.shape == (1, 96) and step.kept == () and step.cache.bytes == 0


def test_what_is_no_graph(tmp_path: Path, tiny_bundle: Bundle) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph at all")
    with pytest.raises(EngineError, match=r"model\.onnx cannot be loaded by onnxruntime"):
        OrtEngine(tmp_path, tiny_bundle)
    with pytest.raises(EngineError, match="cannot be loaded"):
        OrtEngine(tmp_path / "absent", tiny_bundle)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_bad_threads(tiny_bundle: Bundle, threads: Any) -> None:
    with pytest.raises(OptionError, match=r"threads=.* whole number >= 1"):
        OrtEngine(tiny_bundle.path, tiny_bundle, threads=threads)


def test_threads_default_to_physical_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this platform has no CPU affinity")
    assert 1 <= module.physical_cores() <= len(os.sched_getaffinity(0))
    assert module.session_options(None).intra_op_num_threads == module.physical_cores()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    siblings = {0: "0,2", 1: "1,3", 2: "0,2"}  # cpu 3 cannot be read

    def read(self: Path, *_: object, **__: object) -> str:
        try:
            return siblings[int(self.parts[5].removeprefix("cpu"))]
        except KeyError:
            raise FileNotFoundError(self) from None

    monkeypatch.setattr(Path, "read_text", read)
    assert module.physical_cores() == 3


def test_unknown_provider_and_backend(tiny_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="did you mean 'cuda'"):
        OrtEngine(tiny_bundle.path, tiny_bundle, provider="cude")
    with pytest.raises(OptionError, match="did you mean 'ort'"):
        open_engine(tiny_bundle, "onnxort")
    with pytest.raises(OptionError, match="the backends are ort"):
        open_engine(tiny_bundle, "zzz")


def test_cuda_that_is_not_there_is_an_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EngineError, match=r"has no CUDAExecutionProvider.*fstq-infer\[ort-gpu\]"):
        OrtEngine(tiny_bundle.path, tiny_bundle, provider="cuda")
    found = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)  # onnxruntime-gpu without a GPU
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["CPUExecutionProvider"])
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: make(*a, **(k | {"providers": ["CPUExecutionProvider"]}))
    )
    with pytest.raises(EngineError, match="fell back to CPUExecutionProvider: CUDAExecutionProvider could not"):
        OrtEngine(tiny_bundle.path, tiny_bundle, provider="cuda")


def test_without_onnxruntime(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime'.*pip install 'fstq-infer\[ort\]'"):
        OrtEngine(tiny_bundle.path, tiny_bundle)


def test_importing_loads_no_backend() -> None:
    code = (
        "import sys, fstq_infer.runtime.ort, fstq_infer.runtime.load; "
        "print([m for m in ('onnxruntime', 'fstq_engines', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_open_engine_builds_once(
    tiny_bundle: Bundle, engine: OrtEngine, engine_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = open_engine(tiny_bundle, threads=1)
    assert "optimising the graph" in caplog.text and len(list(engine_cache.iterdir())) == 1
    caplog.clear()
    second = open_engine(tiny_bundle, threads=1)
    assert "optimising" not in caplog.text
    ids = tokens(30)
    for opened in (first, second):
        assert isinstance(opened, OrtEngine)
        np.testing.assert_allclose(call(opened, ids, [15, 9]).logits, call(engine, ids, [15, 9]).logits, atol=1e-4)
