"""fstq_engines.tensorrt.float4 and what fp8 and nvfp4 need of a GPU: exact, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("mobius", reason="exporting needs the 'export' extra")

import onnx_ir as ir
from fstq_engines.tensorrt.capabilities import capabilities
from fstq_engines.tensorrt.float4 import NVFP4, Float4, split
from fstq_engines.tensorrt.traps import check_graph
from onnx_ir.passes import PreconditionError

from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError
from fstq_infer.quant.codes import quantize
from fstq_infer.quant.formats import FORMATS
from tests.engines.tensorrt.graphs import model, value
from tests.engines.tensorrt.lowered import lowered
from tests.engines.tensorrt.test_families import bundle, linted
from tests.export import families


def layer(codes: Any, scales: Any, *, cast: bool = False) -> ir.Model:
    """x times a matrix as an exported graph has it."""
    weights = []
    for name, array in (("w.codes", codes), ("w.scales", scales)):
        tensor = ir.tensor(array, name=name)
        weights.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
    nodes = []
    if cast:
        nodes.append(ir.node("Cast", [weights[1]], {"to": int(ir.DataType.FLOAT)}))
    kind = ir.DataType.FLOAT if cast else ir.DataType.FLOAT16
    read = ir.node(
        "DequantizeLinear", [weights[0], nodes[0].outputs[0] if cast else weights[1]], {"axis": 1, "block_size": 16}
    )
    read.metadata_props["fstq.format"] = NVFP4
    read.outputs[0].type = ir.TensorType(kind)
    turned = ir.node("Transpose", [read.outputs[0]], {"perm": [1, 0]})
    x = value("x", ["s", codes.shape[1]], kind)
    return model([x], [*nodes, read, turned, ir.node("MatMul", [x, turned.outputs[0]])], ["s", len(codes)], kind)


@pytest.mark.parametrize("cast", [False, True])
def test_numbers_are_packed_exactly(cast: bool) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, (32, 64)).astype(np.float32)
    found = quantize(weight, FORMATS[NVFP4])
    made = layer(found.codes, found.scales, cast=cast)
    pass_ = Float4()
    pass_(made)
    assert pass_.changed == 1
    outer = next(n for n in made.graph if n.op_type == "DequantizeLinear" and "block_size" in n.attributes)
    inner = next(n for n in made.graph if n.op_type == "DequantizeLinear" and "block_size" not in n.attributes)
    codes, parts, whole = (v.const_value.numpy() for v in (outer.inputs[0], *inner.inputs))  # type: ignore[union-attr]
    assert (codes.dtype.name, parts.dtype.name, whole.dtype.name) == ("float4_e2m1fn", "float8_e4m3fn", "float32")
    scales = np.repeat(parts.astype(np.float32) * whole, 16, 1)
    np.testing.assert_array_equal(codes.astype(np.float32) * scales, found.dequantize())


def test_codes_and_scales_that_it_cannot_hold_are_refused() -> None:
    good = np.array([[0, 1, 2, 3, 4, 6, 8, 12] * 2] * 4, np.int8)
    scales = np.full((4, 1), 0.5, np.float16)
    Float4()(layer(good, scales))
    bad = good.copy()
    bad[2, 3] = 5
    with pytest.raises(PreconditionError, match=r"w\.codes holds codes that are no numbers of nvfp4"):
        Float4()(layer(bad, scales))
    for odd in (0.3, 1e-7):  # more significant bits than four; further below the others than E4M3 reaches
        uneven = scales.copy()
        uneven[1] = odd
        with pytest.raises(PreconditionError, match="E4M3 numbers times one power of two; export the model again"):
            Float4()(layer(good, uneven))


@pytest.mark.parametrize("largest", [1.0, 1.75, 1.875, 448.0, 2.0**-20])
def test_the_largest_scale_stays_a_number(largest: float) -> None:
    parts, whole = split(np.array([[largest, largest * 2.0**-13]], np.float32))
    assert np.isfinite(parts.astype(np.float32)).all() and 224 <= parts.astype(np.float32).max() <= 448
    np.testing.assert_array_equal(parts.astype(np.float32) * whole, [[largest, largest * 2.0**-13]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A tiny model in each format."""
    found = {}
    for form in ("fp8", "nvfp4"):
        folder = tmp_path_factory.mktemp(form)
        found[form] = bundle(families.make("qwen2", folder / "hf"), folder, (), form)
    return found


@pytest.mark.parametrize(("form", "says"), [("fp8", r"float8 .*int8 or int4"), ("nvfp4", r"float4 .*--precision int4")])
def test_a_gpu_without_the_format_is_named(form: str, says: str, exported: dict[str, Bundle]) -> None:
    graph = exported[form].file("model.onnx")
    orin, thor = (capabilities("tensorrt", "10.13", sm) for sm in (87, 110))
    with pytest.raises(EngineError, match=says):
        check_graph(lowered(graph, "decomposed", []), orin, [])
    check_graph(lowered(graph, "decomposed", []), thor, [])
    with pytest.raises(EngineError, match=says):
        linted(exported[form], "orin-nano", context=64)


def test_versions_before_fp4_have_none() -> None:
    assert not capabilities("tensorrt", "10.7", 110).nvfp4 and capabilities("tensorrt", "10.8", 110).nvfp4
    assert not capabilities("tensorrt", "who knows", 110).nvfp4


@pytest.mark.parametrize("target", ["sm120", "thor"])
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_it_builds_where_the_gpu_has_the_format(form: str, target: str, exported: dict[str, Bundle]) -> None:
    report = linted(exported[form], target, context=64)
    assert report.plan_bytes > 0 and "SM 120" in report.built_with
