"""fstq_infer.runtime.ort_caches: caches in place of every type, in batches that fork and grow, and after a failed call.

The graphs are small and say exactly what is cached: logits are sums over all that is attended to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="building an engine needs the 'ort' extra")

from fstq_infer.errors import EngineError  # noqa: E402
from fstq_infer.runtime.load import build_engine  # noqa: E402
from fstq_infer.runtime.ort import MODEL, OrtEngine  # noqa: E402
from fstq_infer.runtime.ort_caches import LENGTHS, ROOM, SharedCache  # noqa: E402
from tests.conftest import VOCABULARY, write_bundle  # noqa: E402

VOCAB = 4
KINDS = ("FLOAT", "FLOAT16", "BFLOAT16")


def toy(kind: str) -> Any:
    """One layer that caches token ids as keys and values; logits v: sum of (id x (position + 1 + v)) over the text."""
    kinds = ir.DataType

    def port(name: str, type: Any, *shape: int | str) -> Any:
        return ir.Value(name=name, type=ir.TensorType(type), shape=ir.Shape(shape))

    cached, own = ("batch", 1, "room", 1), kinds[kind]
    ids, positions, lengths, past, key, value = inputs = [
        port("input_ids", kinds.INT64, "batch", "sequence"),
        port("position_ids", kinds.INT64, "batch", "sequence"),
        port(LENGTHS, kinds.INT64, 1),
        port("past_positions.0", kinds.INT64, "batch", "room"),
        port("past_key_values.0.key", own, *cached),
        port("past_key_values.0.value", own, *cached),
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 24}, name="toy")

    def constant(name: str, array: NDArray[Any]) -> Any:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        return graph.initializers[name]

    tape = ir.tape.Tape()
    at = tape.op("Expand", [lengths, tape.op("Shape", [ids], {"start": 0, "end": 1})])
    new = tape.op("Reshape", [tape.op("Cast", [ids], {"to": int(own)}), constant("wide", np.array([0, 1, -1, 1]))])
    made = [
        tape.op("TensorScatter", [past, positions, at], {"axis": 1}),
        tape.op("TensorScatter", [key, new, at], {"axis": 2}),
        tape.op("TensorScatter", [value, new, at], {"axis": 2}),
    ]
    seen = tape.op("Reshape", [tape.op("Cast", [made[1]], {"to": 1}), constant("flat", np.array([0, -1]))])
    places = tape.op("Cast", [made[0]], {"to": 1})
    valid = tape.op("Cast", [tape.op("GreaterOrEqual", [made[0], constant("zero", np.array(0))])], {"to": 1})
    weights = tape.op("Add", [tape.op("Unsqueeze", [places, constant("two", np.array([2]))]),
                              constant("steps", np.arange(1, VOCAB + 1, dtype=np.float32))])  # fmt: skip
    shown = tape.op("Unsqueeze", [tape.op("Mul", [seen, valid]), constant("one", np.array([1]))])
    logits = tape.op("MatMul", [shown, weights])
    names = ["logits", "present_positions.0", "present.0.key", "present.0.value"]
    for name, out, like in zip(names, [logits, *made], [None, past, key, value], strict=True):
        out.name = name
        out.type = ir.TensorType(kinds.FLOAT) if like is None else like.type
        out.shape = ir.Shape(["batch", 1, VOCAB]) if like is None else like.shape
        graph.outputs.append(out)
    graph.extend(tape.nodes)
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OrtEngine]:
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        ir.save(toy(kind), folder / MODEL)
        bundle = write_bundle(folder / "b", folder, (), layers=1, vocab_size=VOCAB, max_positions=4096)
        made[kind] = OrtEngine(folder, bundle, threads=1)
    return made


class Text:
    """What a batch of rows holds, beside the cache that should hold the same."""

    def __init__(self, engine: OrtEngine, rows: int) -> None:
        self.engine, self.cache = engine, engine.empty_cache(rows)
        self.ids = self.positions = np.zeros((rows, 0), np.int64)

    def add(self, count: int, seed: int, pad: int = 0) -> Text:
        """This text and ``count`` more tokens, the first ``pad`` of the last row's padding; logits are checked."""
        rows = len(self.ids)
        ids = np.random.default_rng(seed).integers(0, 200, (rows, count))
        start = self.positions.max(1, initial=-1) + 1
        positions = start[:, None] + np.arange(count)
        positions[-1] = np.where(np.arange(count) < pad, -1, positions[-1] - pad)
        step = self.engine.forward(ids, positions, np.zeros((rows, 0), np.int64), self.cache)
        other = Text(self.engine, rows)
        other.cache = step.cache
        other.ids, other.positions = np.hstack([self.ids, ids]), np.hstack([self.positions, positions])
        valid = other.positions >= 0
        wanted = [(other.ids * valid * (other.positions + 1 + v)).sum(1) for v in range(VOCAB)]
        np.testing.assert_allclose(step.logits, np.stack(wanted, 1), rtol=1e-5)
        return other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_caches_of_every_type_grow_and_fork(engines: dict[str, OrtEngine], kind: str, rows: int) -> None:
    start = text = Text(engines[kind], rows).add(20, 0, pad=5)
    buffers = set()
    for seed in range(ROOM + 10):  # past the room that was there
        text = text.add(1, seed)
        buffers.add(id(text.cache.buffers))
    assert len(buffers) == 2 and text.cache.lengths == (20 + ROOM + 10,)
    size = {"FLOAT": 4}.get(kind, 2)
    assert text.cache.bytes == 2 * rows * text.cache.buffers.sizes[0] * size
    forks = [start.add(7, seed) for seed in (100, 101)]
    assert len({id(fork.cache.buffers) for fork in (start, *forks)}) >= 2
    for fork in (*forks, text, start):
        fork.add(3, 5).add(1, 6)


steps = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=8)


@given(steps, st.integers(1, 3), st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_any_tree_of_texts(
    engines: dict[str, OrtEngine], made: list[tuple[int, int, int]], rows: int, kind: str
) -> None:
    """Each step goes on from any earlier text; every cache keeps what it held."""
    texts = [Text(engines[kind], rows)]
    for number, (before, count, pad) in enumerate(made):
        texts.append(texts[before % len(texts)].add(count, number, min(pad, count - 1)))
    for text in texts:
        text.add(2, 99)


def fails_late(graph: Path, out: Path) -> Path:
    """The tiny graph, unless the last id is outside the vocabulary: then it fails when all layers have run."""
    model = ir.load(graph / MODEL)
    found = model.graph
    ids, logits = found.inputs[0], next(value for value in found.outputs if value.name == "logits")
    constants = {
        "low": np.array(0), "high": np.array(VOCABULARY - 1), "minus": np.array([-1]), "last": np.array([2**62]),
        "axis": np.array([1]), "nothing": np.array(0, np.float32), "zeros": np.zeros(VOCABULARY, np.float32),
    }  # fmt: skip
    for name, array in constants.items():
        tensor = ir.tensor(array, name=f"late/{name}")
        found.initializers[f"late/{name}"] = ir.Value(
            name=f"late/{name}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
    own = {name: found.initializers[f"late/{name}"] for name in constants}
    embedding = next(node for node, _ in ids.uses() if node.op_type == "Gather")
    clip = ir.node("Clip", [ids, own["low"], own["high"]])
    found.insert_before(embedding, clip)
    embedding.replace_input_with(1, clip.outputs[0])
    tape = ir.tape.Tape()
    last = tape.op("Slice", [ids, own["minus"], own["last"], own["axis"]])
    waiting = tape.op("Cast", [tape.op("Mul", [tape.op("ReduceMax", [logits], {"keepdims": 0}), own["nothing"]])],
                      {"to": int(ir.DataType.INT64)})  # fmt: skip
    extra = tape.op("Gather", [own["zeros"], tape.op("Add", [last, waiting])], {"axis": 0})
    total = tape.op("Add", [logits, tape.op("Unsqueeze", [extra, own["minus"]])])
    total.type, total.shape = logits.type, logits.shape
    found.extend(tape.nodes)
    found.outputs[found.outputs.index(logits)] = total
    logits.name, total.name = "late/logits", "logits"
    out.mkdir()
    ir.save(model, out / MODEL, external_data="model.onnx.data")
    return out


def test_a_call_that_fails_late_leaves_no_trace(tiny_graph: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", fails_late(tiny_graph, tmp_path / "late"))
    engine = OrtEngine(build_engine(bundle, directory=tmp_path / "engine"), bundle, threads=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY, (1, 30))

    def run(tokens: NDArray[np.int64], start: int, cache: Any) -> Any:
        count = tokens.shape[1]
        return engine.forward(tokens, np.arange(start, start + count)[None], np.full((1, 2), count), cache)

    start = run(ids[:, :20], 0, engine.empty_cache(1))
    assert isinstance(start.cache, SharedCache)
    buffers = start.cache.buffers
    before = [array[..., 20:25].copy() if array.ndim == 2 else array[:, :, 20:25].copy() for array in buffers.arrays]
    wrong = np.append(ids[:, :4], 10**6)[None]
    with pytest.raises(EngineError, match="failed on 1 x 5 tokens"):
        run(wrong, 3, start.cache)  # positions that later tokens would attend to
    after = [array[..., 20:25] if array.ndim == 2 else array[:, :, 20:25] for array in buffers.arrays]
    assert all((a != b).any() for a, b in zip(before, after, strict=True)), "every layer was written to"
    fresh = run(ids[:, :21], 0, engine.empty_cache(1)).logits.copy()
    step = run(ids[:, 20:21], 20, start.cache)
    np.testing.assert_allclose(step.logits, fresh, atol=1e-4)
    assert step.cache.buffers is not buffers
