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
from fstq_engines import codes, kernels  # noqa: E402
from fstq_engines.profile import layer as layer_model  # noqa: E402
from fstq_engines.quantized import FEW, METADATA, QuantizedLayers, layers  # noqa: E402
from fstq_engines.rounding import RoundedInputs  # noqa: E402

from fstq_infer.quant.codes import rounded_inputs  # noqa: E402
from fstq_infer.quant.formats import FORMATS  # noqa: E402

OUTPUTS, INPUTS = 48, 160
DYNAMIC, EITHER = "int8-dynamic", "int4-128-dynamic"


def value(name: str, shape: list[int | str], kind: Any = None, tensor: Any = None) -> Any:
    kind = kind or ir.DataType.FLOAT
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)


def graph_of(form: str, reader: str, stored: NDArray[Any], scales: NDArray[Any]) -> Any:
    """What the exporter writes: codes, DequantizeLinear with cast scales, Transpose for a MatMul, the reader."""
    tensors = {"w.codes": ir.tensor(stored, name="w.codes"), "w.scales": ir.tensor(scales, name="w.scales")}
    inits = [value(name, list(t.shape), t.dtype, t) for name, t in tensors.items()]
    tape = ir.tape.Tape()
    typed = tape.op("Cast", [inits[1]], {"to": int(ir.DataType.FLOAT)})
    layout = {"axis": 1, "block_size": int(form.split("-")[1])} if form.startswith("int4") else {"axis": 0}
    weight = tape.op("DequantizeLinear", [inits[0], typed], layout)
    given = value("x", ["rows", INPUTS])
    if reader == "Gather":
        given = value("x", ["rows"], ir.DataType.INT64)
        out = tape.op("Gather", [weight, given], {"axis": 0})
    elif reader.startswith("Gemm"):
        bias = ir.tensor(np.arange(OUTPUTS, dtype=np.float32), name="bias")
        inits.append(value("bias", [OUTPUTS], bias.dtype, bias))
        if reader == "Gemm":
            weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
        out = tape.op("Gemm", [given, weight, inits[-1]], {"transB": int(reader != "Gemm")})
        out.producer().metadata_props[METADATA] = form
    else:
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
        made = rng.integers(-8, 8, (OUTPUTS, INPUTS)).astype(ml_dtypes.int4)
        return made, rng.uniform(0.01, 0.02, (OUTPUTS, -(-INPUTS // block))).astype(np.float16)
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
        (
            DYNAMIC,
            {"ReduceMax": 1, "ReduceMin": 1, "Neg": 1, "Max": 1, "Div": 2, "QuantizeLinear": 1}
            | {"MatMulIntegerToFloat": 1, "Mul": 1},
        ),
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


@pytest.mark.parametrize("form", ["int8", DYNAMIC, "int4-32", "int4-128"])
@pytest.mark.parametrize("reader", ["MatMul", "Gemm", "Gemm transB"])
def test_a_row_is_computed_as_the_formats_say_whatever_is_beside_it(form: str, reader: str) -> None:
    """Rounded as the exporter's predictions have it, and not at all by what other tokens, or padding, hold."""
    lowering = QuantizedLayers(kernels.difference)
    model = graph_of(form, reader, *weights(form))
    written = RoundedInputs()(graph_of(form, reader, *weights(form))).model
    lowered = lowering(model).model
    assert lowering.changed == 1 and lowering.refused == 0 and 0 < lowering.worst < 1e-5
    assert {"Gemm", "MatMul", "DequantizeLinear"}.isdisjoint({node.op_type for node in lowered.graph})
    x = np.random.default_rng(3).normal(size=(4, INPUTS)).astype(np.float32)
    x[2] = 0
    found = run(lowered, x)
    np.testing.assert_allclose(found[:1], run(lowered, x[:1]), atol=1e-5)  # another kernel
    louder = np.concatenate([x[:1], 1000 * x[1:]])
    np.testing.assert_array_equal(found[:1], run(lowered, louder)[:1])
    own, scales = weights(form)
    block = FORMATS[form].block or INPUTS
    numbers = own.astype(np.float32) * np.repeat(scales.astype(np.float32).reshape(OUTPUTS, -1), block, 1)[:, :INPUTS]
    expected = rounded_inputs(x, FORMATS[form]) @ numbers.T + (np.arange(OUTPUTS) if "Gemm" in reader else 0)
    scale = expected.std() * 2e-5
    np.testing.assert_allclose(found, expected, atol=scale)
    np.testing.assert_allclose(run(written, x), expected, atol=scale)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_gemm_that_is_more_than_a_layer_stays(attributes: dict[str, Any]) -> None:
    model = graph_of("int8", "Gemm transB", *weights("int8"))
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    for name, number in attributes.items():
        gemm.attributes[name] = (
            ir.AttrFloat32(name, number) if isinstance(number, float) else ir.AttrInt64(name, number)
        )
    lowering = QuantizedLayers()
    assert not lowering(model).modified and lowering.changed == 0


@pytest.mark.parametrize("wrong", ["codes", "rows", "scales", "kernel"])
@pytest.mark.parametrize(
    ("form", "way"), [("int8", "blocks"), ("int4-32", "blocks"), (DYNAMIC, "dynamic"), ("int4-32", "rows")]
)
def test_a_kernel_that_computes_something_else_is_found(
    form: str, way: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer,) = layers(graph_of(form, "Gather" if way == "rows" else "MatMul", *weights(form)).graph)
    assert kernels.difference(layer.weight, way) < 1e-5
    numbers = layer.weight.numbers()
    changed = {
        "codes": numbers + (np.arange(INPUTS) == 77) * numbers.std(),
        "rows": np.roll(numbers, 1, 0),
        "scales": numbers * np.float32(1.001),
    }
    if wrong == "kernel":
        monkeypatch.setattr(codes.Weight, way, lambda self, tape, x, *_: tape.op("NoSuchOperator", [x]))
        assert kernels.difference(layer.weight, way) == float("inf")
    else:
        monkeypatch.setattr(codes.Weight, "numbers", lambda self: changed[wrong])
        assert kernels.difference(layer.weight, way) > 1e-4


def test_large_tables_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = layers(graph_of("int8", "MatMul", *weights("int8")).graph)
    monkeypatch.setattr(kernels, "AT_ONCE", 10 * INPUTS)
    seen: list[int] = []
    part = codes.Weight.part

    def counted(self: Any, graph: Any, rows: slice) -> Any:
        seen.append(rows.start)
        return part(self, graph, rows)

    monkeypatch.setattr(codes.Weight, "part", counted)
    assert kernels.difference(layer.weight, "blocks") < 1e-5
    assert seen == [0, 10, 20, 30, 40]


def test_a_wrong_kernel_gives_way_to_the_next_or_to_none(caplog: pytest.LogCaptureFixture) -> None:
    model = graph_of(DYNAMIC, "MatMul", *weights(DYNAMIC))
    lowering = QuantizedLayers(lambda _weight, way: float(way == "dynamic"))
    lowered = lowering(model).model
    assert "MatMulNBits" in {node.op_type for node in lowered.graph} and lowering.refused == 0
    assert "'dynamic' differs by 1" in caplog.text
    lowering = QuantizedLayers(lambda *_: float("inf"))
    assert not lowering(graph_of("int8", "MatMul", *weights("int8"))).modified and lowering.refused == 1


@pytest.mark.parametrize(
    ("form", "way"),
    [("int8", "blocks"), ("int8", "rows"), (DYNAMIC, "dynamic"), ("int4-64", "blocks"), ("int4-64", "rows")],
)
def test_bytes_are_those_that_are_stored(form: str, way: str) -> None:
    model = graph_of(form, "Gather" if way == "rows" else "MatMul", *weights(form))
    (layer,) = layers(model.graph)
    lowered = QuantizedLayers()(model).model
    own = [tensor.const_value for name, tensor in lowered.graph.initializers.items() if name.startswith("w.codes.")]
    assert sum(tensor.nbytes for tensor in own) == layer.weight.bytes(way) > layer.weight.stored


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
    assert counts["QuantizeLinear"] == 1 and counts["MatMulIntegerToFloat"] == 2
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


def beside(model: Any, form: str) -> Any:
    """The model of one layer with a second one that reads the same inputs, and both outputs."""
    graph = model.graph
    node = next(node for node in graph if node.op_type == "MatMul")
    other = ir.node("MatMul", list(node.inputs))
    other.metadata_props[METADATA] = form
    other.outputs[0].name, other.outputs[0].type = "z", node.outputs[0].type
    other.outputs[0].shape = node.outputs[0].shape
    graph.insert_after(node, other)
    graph.outputs.append(other.outputs[0])
    return model


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1, 40])
def test_few_tokens_are_computed_from_int4_codes_and_many_from_int8_ones(tokens: int) -> None:
    form = FORMATS[EITHER]
    x = np.random.default_rng(tokens).normal(size=(2, tokens, INPUTS)).astype(np.float32)
    lowering = QuantizedLayers(kernels.difference)
    model = layer_model(form, OUTPUTS, INPUTS)
    weight = next(layers(model.graph)).weight
    numbers, wide = weight.numbers(), weight.widened().numbers()
    found = run(lowering(model).model, x)
    assert lowering.changed == lowering.rounding == 1 and lowering.refused == 0
    few = rounded_inputs(x.reshape(-1, INPUTS), FORMATS["int4-128"]) @ numbers.T
    many = rounded_inputs(x.reshape(-1, INPUTS), form) @ wide.T
    right, other = (few, many) if tokens <= FEW else (many, few)
    np.testing.assert_allclose(found.reshape(-1, OUTPUTS), right, atol=right.std() * 2e-5)
    assert np.abs(right - other).max() > right.std() * 1e-4


def test_int8_codes_of_an_int4_matrix_are_close_to_it() -> None:
    weight = next(layers(layer_model(FORMATS[EITHER], OUTPUTS, INPUTS).graph)).weight
    numbers, wide = weight.numbers(), weight.widened()
    steps = np.abs(numbers).max(1, keepdims=True) / 127
    assert wide.bits == 8 and wide.block == 0 and wide.scales.shape == (OUTPUTS,)
    assert (np.abs(wide.numbers() - numbers) <= steps * 0.501).all()


def test_layers_with_the_same_inputs_choose_together_and_round_them_once() -> None:
    model = beside(layer_model(FORMATS[EITHER], OUTPUTS, INPUTS), EITHER)
    x = np.random.default_rng(2).normal(size=(1, FEW + 2, INPUTS)).astype(np.float32)
    expected = run(model, x)
    lowered = QuantizedLayers()(model).model
    (node,) = (node for node in lowered.graph if node.op_type == "If")
    many, few = (Counter(n.op_type for n in node.attributes[b].value) for b in ("then_branch", "else_branch"))
    assert many["QuantizeLinear"] == 1 and many["MatMulIntegerToFloat"] == 2 and few == {"MatMulNBits": 2}
    assert np.sqrt(np.mean((run(lowered, x) - expected) ** 2)) / expected.std() < 0.02


@pytest.mark.parametrize(("wrong", "left"), [("dynamic", "MatMulNBits"), ("blocks", "MatMul")])
def test_where_one_of_two_kernels_is_wrong_only_the_other_is_used(wrong: str, left: str) -> None:
    lowering = QuantizedLayers(lambda _weight, way: float(way == wrong))
    lowered = lowering(layer_model(FORMATS[EITHER], OUTPUTS, INPUTS)).model
    operators = {node.op_type for node in lowered.graph}
    assert left in operators and "If" not in operators


def test_bytes_of_both_copies_are_counted() -> None:
    model = layer_model(FORMATS[EITHER], OUTPUTS, INPUTS)
    (layer,) = layers(model.graph)
    lowered = QuantizedLayers()(model).model
    own = [t.const_value for name, t in lowered.graph.initializers.items() if name.startswith("w.codes.")]
    assert sum(tensor.nbytes for tensor in own) == layer.weight.bytes("either")
