"""fstq_engines.quantized: layers with integer weights, lowered and as they are written, in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ort = pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="building an engine needs the 'ort' extra")

import ml_dtypes  # noqa: E402
from fstq_engines import parity  # noqa: E402
from fstq_engines.quantized import DYNAMIC, METADATA, QuantizedLayers  # noqa: E402

from fstq_infer.errors import ParityError  # noqa: E402

OUTPUTS, INPUTS = 48, 160


def value(name: str, shape: list[int | str], kind: Any = None, tensor: Any = None) -> Any:
    kind = kind or ir.DataType.FLOAT
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)


def graph_of(form: str, reader: str, codes: NDArray[Any], scales: NDArray[Any]) -> Any:
    """What the exporter writes: codes, DequantizeLinear with cast scales, Transpose for a MatMul, the reader."""
    tensors = {"w.codes": ir.tensor(codes, name="w.codes"), "w.scales": ir.tensor(scales, name="w.scales")}
    inits = [value(name, list(t.shape), t.dtype, t) for name, t in tensors.items()]
    tape = ir.tape.Tape()
    typed = tape.op("Cast", [inits[1]], {"to": int(ir.DataType.FLOAT)})
    layout = {"axis": 1, "block_size": int(form.split("-")[1])} if form.startswith("int4") else {"axis": 0}
    weight = tape.op("DequantizeLinear", [inits[0], typed], layout)
    if reader == "Gather":
        given = value("x", ["rows"], ir.DataType.INT64)
        out = tape.op("Gather", [weight, given], {"axis": 0})
    else:
        given = value("x", ["rows", INPUTS])
        out = tape.op("MatMul", [given, tape.op("Transpose", [weight], {"perm": [1, 0]})])
        out.producer().metadata_props[METADATA] = form
    out.name, out.type = "y", ir.TensorType(ir.DataType.FLOAT)
    out.shape = ir.Shape(["rows", INPUTS if reader == "Gather" else OUTPUTS])
    graph = ir.Graph([given], [out], nodes=tape.nodes, initializers=inits, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: Any, x: NDArray[Any]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, {"x": x})[0]
    return found


def weights(form: str, seed: int = 0) -> tuple[NDArray[Any], NDArray[np.float16]]:
    rng = np.random.default_rng(seed)
    if form.startswith("int4"):
        block = int(form.split("-")[1])
        codes = rng.integers(-8, 8, (OUTPUTS, INPUTS)).astype(ml_dtypes.int4)
        return codes, rng.uniform(0.01, 0.02, (OUTPUTS, -(-INPUTS // block))).astype(np.float16)
    return rng.integers(-127, 128, (OUTPUTS, INPUTS), np.int8), rng.uniform(0.001, 0.002, OUTPUTS).astype(np.float16)


@pytest.mark.parametrize("form", ["int8", DYNAMIC, "int4-32"])
def test_rows_are_looked_up_exactly(form: str) -> None:
    model = graph_of(form, "Gather", *weights(form))
    ids = np.array([3, 0, 47, 3])
    expected = run(model, ids)
    lowered = QuantizedLayers()(model).model
    assert "DequantizeLinear" not in {node.op_type for node in lowered.graph}
    np.testing.assert_allclose(run(lowered, ids), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "operators"),
    [
        ("int8", {"MatMulNBits": 1}),
        ("int4-32", {"MatMulNBits": 1}),
        ("int4-64", {"MatMulNBits": 1}),
        ("int4-128", {"MatMulNBits": 1}),
        (DYNAMIC, {"DynamicQuantizeLinear": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2}),
    ],
)
def test_layers_compute_with_their_codes(form: str, operators: dict[str, int]) -> None:
    model = graph_of(form, "MatMul", *weights(form))
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(5, INPUTS)) * np.geomspace(0.5, 2, 5)[:, None]).astype(np.float32)
    expected = run(model, x)
    lowering = QuantizedLayers()
    lowered = lowering(model).model
    assert lowering.changed == 1 and Counter(node.op_type for node in lowered.graph) == operators
    error = np.sqrt(np.mean((run(lowered, x) - expected) ** 2)) / expected.std()
    assert 0 < error < (0.02 if form == DYNAMIC else 0.01)  # inputs are rounded to int8, and nothing else


def test_layers_with_the_same_inputs_round_them_once() -> None:
    model = graph_of(DYNAMIC, "MatMul", *weights(DYNAMIC))
    graph = model.graph
    node = next(node for node in graph if node.op_type == "MatMul")
    other = ir.node("MatMul", list(node.inputs))
    other.metadata_props[METADATA] = DYNAMIC
    total = ir.node("Add", [node.outputs[0], other.outputs[0]])
    total.outputs[0].name, total.outputs[0].type = "total", ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, [other, total])
    graph.outputs[0] = total.outputs[0]
    x = np.random.default_rng(2).normal(size=(3, INPUTS)).astype(np.float32)
    expected = run(model, x)
    lowered = QuantizedLayers()(model).model
    counts = Counter(node.op_type for node in lowered.graph)
    assert counts["DynamicQuantizeLinear"] == 1 and counts["MatMulInteger"] == 2
    names = [name for name in lowered.graph.initializers if "columns" in name]
    assert len(names) == 1  # one copy of the weights
    assert np.sqrt(np.mean((run(lowered, x) - expected) ** 2)) / expected.std() < 0.02


def test_other_weights_stay() -> None:
    model = graph_of("int8", "MatMul", *weights("int8"))
    model.graph.initializers["w.codes"].const_value = None  # not known before the graph runs
    lowering = QuantizedLayers()
    assert not lowering(model).modified and lowering.changed == 0


def test_layers_of_a_half_precision_graph_stay() -> None:
    model = graph_of("int8", "MatMul", *weights("int8"))
    cast = next(node for node in model.graph if node.op_type == "Cast")
    cast.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
    lowering = QuantizedLayers()
    assert not lowering(model).modified and lowering.changed == 0


def test_looking_up_rows_rounds_no_inputs() -> None:
    for reader, rounding in (("Gather", 0), ("MatMul", 1)):
        lowering = QuantizedLayers()
        lowering(graph_of("int8", reader, *weights("int8")))
        assert (lowering.changed, lowering.rounding) == (1, rounding)


def test_rounding_is_told_from_wrong_weights() -> None:
    """The comparison of an engine that rounds with its bundle, on logits that differ a little, and by a layer."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 500)).astype(np.float32)
    kept = np.arange(40)[None]
    near, far = logits + rng.normal(size=logits.shape).astype(np.float32) * 0.1, np.roll(logits, 1, axis=1)
    swapped, others = np.where(kept < 4, kept + 50, kept), kept + 20
    case = parity.Case("dense", (np.arange(44),), np.array([[40]]))

    def compare(made: NDArray[Any], columns: NDArray[Any]) -> parity.Parity:
        given, found = parity.Output((logits,), (kept,)), parity.Output((made,), (columns,))
        return parity.compare([case], [given], [found], "float32", rounded=True)

    assert 0.09 < compare(near, swapped).difference < 0.11
    with pytest.raises(ParityError, match="other logits"):
        compare(far, kept)
    with pytest.raises(ParityError, match="other tokens"):
        compare(near, others)
    with pytest.raises(ParityError, match="other logits"):
        compare(near * np.float32(np.nan), kept)
