"""fstq_engines.static_cache: which nodes the pass leaves, what it refuses, and engines where it cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="building an engine needs the 'ort' extra")

from fstq_engines import ort  # noqa: E402
from fstq_engines.causal_blocks import BLOCKS  # noqa: E402
from fstq_engines.static_cache import OPSET, StaticCache, probe_model  # noqa: E402
from onnx_ir.passes import PreconditionError  # noqa: E402

from fstq_infer.bundle import Bundle  # noqa: E402
from fstq_infer.errors import EngineError, MissingExtraError  # noqa: E402
from fstq_infer.runtime.ort import MODEL, OrtEngine  # noqa: E402
from fstq_infer.runtime.ort_caches import LENGTHS, ReturnedCache, SharedCache  # noqa: E402
from tests.conftest import write_bundle  # noqa: E402


@pytest.fixture
def model(tiny_bundle: Bundle) -> Any:
    return ir.load(tiny_bundle.file(MODEL))


def test_every_cache_is_scattered_into_and_nothing_else_changes(model: Any, tiny_bundle: Bundle) -> None:
    before = Counter(node.op_type for node in model.graph)
    ends = [[value.name for value in side] for side in (model.graph.inputs, model.graph.outputs)]
    after = Counter(node.op_type for node in StaticCache([1, 3])(model).model.graph)
    layers, groups = tiny_bundle.manifest.model.layers, 3
    assert after["TensorScatter"] == 2 * layers + groups and after["If"] == before["Attention"] == layers
    for node in (node for node in model.graph if node.op_type == "If"):
        inner = [Counter(n.op_type for n in branch.value) for branch in node.attributes.values()]
        assert sorted(counts["Attention"] for counts in inner) == [1, BLOCKS]
    assert after["Concat"] == before["Concat"] - groups
    changed = {"TensorScatter", "Concat", "Slice", "Expand", "Shape", "Reshape", "Transpose", "Where", "Equal"}
    changed |= {"If", "Attention", "Squeeze", "GreaterOrEqual"}
    assert {op for op in before | after if before[op] != after[op]} <= changed
    inputs, outputs = ([value.name for value in side] for side in (model.graph.inputs, model.graph.outputs))
    assert outputs == ends[1] and [name for name in inputs if name != LENGTHS] == ends[0] and LENGTHS in inputs
    assert model.opset_imports[""] == OPSET
    outs = {value.name: value for value in model.graph.outputs}
    for past in model.graph.inputs[4:]:
        present = outs[past.name.replace("past_key_values", "present").replace("past_positions", "present_positions")]
        assert past.shape == present.shape and past.dtype == present.dtype


def test_a_graph_is_lowered_once(model: Any) -> None:
    lowered = StaticCache([1, 3])(model).model
    with pytest.raises(PreconditionError, match="contract 1"):
        StaticCache([1, 3])(lowered)


def test_a_graph_with_fewer_groups_than_stages_is_refused(model: Any) -> None:
    with pytest.raises(PreconditionError, match=r"past_positions\.3"):
        StaticCache([1, 2, 3])(model)


@pytest.mark.parametrize("change", ["an Identity before Attention", "a Shape beside it", "positions made otherwise"])
def test_a_graph_whose_cache_is_made_otherwise_copies_it(
    tiny_graph: Path, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ir.load(tiny_graph / MODEL)
    graph = model.graph
    attention = next(node for node in graph if node.op_type == "Attention")
    positions = next(value for value in graph.outputs if value.name == "present_positions.0")
    if change.startswith("an Identity"):
        between = ir.node("Identity", [attention.inputs[4]])
        graph.insert_before(attention, between)
        attention.replace_input_with(4, between.outputs[0])
        between.outputs[0].type, between.outputs[0].shape = attention.inputs[4].type, attention.inputs[4].shape
    elif change.startswith("a Shape"):
        beside = ir.node("Shape", [attention.inputs[4]])
        graph.insert_before(attention, beside)
    else:
        after = ir.node("Identity", [positions])
        made = after.outputs[0]
        made.type, made.shape = positions.type, positions.shape
        graph.append(after)
        graph.outputs[graph.outputs.index(positions)] = made
        positions.name, made.name = "own_positions", "present_positions.0"
    (tmp_path / "graph").mkdir()
    ir.save(model, tmp_path / "graph" / MODEL, external_data="model.onnx.data")
    bundle = write_bundle(tmp_path / "b", tmp_path / "graph")
    with caplog.at_level(logging.WARNING):
        engine = OrtEngine(ort.build(bundle, directory=tmp_path / "engine"), bundle)
    assert "will copy its cache at each call" in caplog.text
    assert isinstance(engine.empty_cache(1), ReturnedCache)


def test_an_older_onnxruntime_gets_the_graph_as_it_is(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [OrtEngine(ort.build(tiny_bundle, directory=tmp_path / "new"), tiny_bundle)]
    monkeypatch.setattr("fstq_engines.static_cache.probe_model", lambda: b"not a model")
    with caplog.at_level(logging.INFO):
        engines.append(OrtEngine(ort.build(tiny_bundle, directory=tmp_path / "old"), tiny_bundle))
    assert "no TensorScatter" in caplog.text
    assert [type(engine.empty_cache(1)) for engine in engines] == [SharedCache, ReturnedCache]


def test_a_full_disk_is_an_engine_error(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(EngineError, match=r"cannot be written.*No space left"):
        ort.build(tiny_bundle, directory=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_an_engine_for_the_cpu_runs_nowhere_else(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound inputs would be copied to the device once, and then be stale."""
    import onnxruntime

    engine = ort.build(tiny_bundle, directory=tmp_path / "engine")
    make = onnxruntime.InferenceSession
    providers = ["CPUExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(make, "get_providers", lambda _: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: make(*a, **(k | {"providers": providers[:1]})))
    with pytest.raises(EngineError, match="built for the CPU"):
        OrtEngine(engine, tiny_bundle, provider="cuda")


def test_building_without_onnx_ir_names_the_extra(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    steps: list[str] = []
    with pytest.raises(MissingExtraError, match=r"fstq-infer\[ort\]"):
        ort.build(tiny_bundle, directory=tmp_path / "engine", progress=steps.append)
    assert len(steps) == 1  # before anything was run


def test_the_probe_model_is_a_model() -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(probe_model(), providers=["CPUExecutionProvider"])
    assert [port.name for port in session.get_inputs()] == ["past", "new", "at"]
