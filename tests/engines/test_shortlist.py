"""fstq_engines.shortlist: the same logits come out as NumPy finds, ties and what is not finite included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="building an engine needs the 'ort' extra")

from fstq_engines import shortlist  # noqa: E402
from fstq_engines.ort import build  # noqa: E402
from onnx_ir.passes import PreconditionError  # noqa: E402

from fstq_infer.bundle import Bundle  # noqa: E402
from fstq_infer.runtime.engine import Engine  # noqa: E402
from fstq_infer.runtime.ort import OrtEngine  # noqa: E402


def graph(vocab: int | None, kind: Any = None) -> Any:
    """A model whose logits are its input."""
    kind = kind or ir.DataType.FLOAT
    given = ir.Value(name="given", type=ir.TensorType(kind), shape=ir.Shape(["batch", 1, vocab]))
    node = ir.node("Identity", [given])
    (logits,) = node.outputs
    logits.name, logits.type, logits.shape = "logits", given.type, given.shape
    made = ir.Graph([given], [logits], nodes=[node], opset_imports={"": 24}, name="g")
    return ir.Model(made, ir_version=10)


def run(model: Any, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    ids, values = session.run(list(shortlist.SHORTLIST), {"given": logits[:, None]})
    return ids, values


@pytest.mark.parametrize("vocab", [151_936, 32_000, 50_257, 20_011, 1 << 14])  # 50,257 = 29 x 1,733; 20,011 is prime
@pytest.mark.parametrize("kind", ["normal", "ties", "flat", "crowded"])
def test_the_largest_logits_and_of_equal_ones_the_first(vocab: int, kind: str) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=(3, vocab)) * 4).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "flat":
        logits[:] = 0.5
    if kind == "crowded":  # all of the largest are neighbours
        logits[:, 64:264] += 100
    ids, values = run(shortlist.Shortlist()(graph(vocab)).model, logits)
    assert ids.shape == values.shape == (3, shortlist.COUNT)
    for row, found in enumerate(ids):
        expected = np.argsort(-logits[row], kind="stable")[: shortlist.COUNT]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(values[row], logits[row][expected])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("vocab", [32_000, 20_011])
def test_what_is_not_finite_spoils_its_own_row_only(bad: float, vocab: int) -> None:
    logits = np.zeros((2, vocab), np.float32)
    logits[1, vocab // 2] = bad
    _, values = run(shortlist.Shortlist()(graph(vocab)).model, logits)
    assert (values[0] == 0).all() and np.isnan(values[1]).all()


def test_half_precision_logits_come_out_wide() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 32_000)).astype(np.float16) * 1000  # their sum is no float16
    ids, values = run(shortlist.Shortlist()(graph(32_000, ir.DataType.FLOAT16)).model, logits)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[0], logits[0][ids[0]])


def test_few_logits_stay_as_they_are() -> None:
    result = shortlist.Shortlist()(graph(shortlist.SMALLEST - 1))
    assert not result.modified and len(result.model.graph.outputs) == 1


def test_an_unknown_number_of_logits_is_refused() -> None:
    with pytest.raises(PreconditionError, match="number of columns"):
        shortlist.Shortlist()(graph(None))


def test_an_engine_hands_it_on(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(engine: Engine, rows: int) -> Any:
        ids = np.arange(5 * rows, dtype=np.int64).reshape(rows, 5) % tiny_bundle.manifest.model.vocab_size
        keep = np.full((rows, 2), 5, np.int64)
        step = engine.forward(ids, np.arange(5)[None].repeat(rows, 0), keep, engine.empty_cache(rows))
        yield step
        yield engine.forward(ids[:, :1], np.full((rows, 1), 5), np.ones((rows, 2), np.int64), step.cache)

    assert all(s.shortlist is None for s in logits(OrtEngine(build(tiny_bundle), tiny_bundle), 2))
    monkeypatch.setattr(shortlist, "SMALLEST", 8)
    monkeypatch.setattr(shortlist, "COUNT", 8)
    engine = OrtEngine(build(tiny_bundle, directory=tmp_path / "engine"), tiny_bundle)
    for step in logits(engine, 2):
        assert step.shortlist is not None
        ids, values = step.shortlist
        np.testing.assert_array_equal(ids, np.argsort(-step.logits, axis=1, kind="stable")[:, :8])
        np.testing.assert_array_equal(values, np.take_along_axis(step.logits, ids, 1))
