"""fstq_engines.tensorrt.traps: the error that a user gets for each, and what TensorRT-RTX itself does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ir = pytest.importorskip("onnx_ir", reason="lowering needs onnx-ir")

from fstq_engines.tensorrt import capabilities, module, parse, traps  # noqa: E402

from fstq_infer.errors import EngineError  # noqa: E402
from tests.engines.tensorrt import graphs  # noqa: E402

ORIN, THOR = (capabilities.capabilities("tensorrt_rtx", "1.7.1", sm) for sm in (87, 110))


@pytest.mark.parametrize("name", graphs.TRAPS)
def test_each_trap_is_an_error_that_says_what_to_do(name: str) -> None:
    make, message = graphs.TRAPS[name]
    with pytest.raises(EngineError, match=message):
        traps.check_graph(make(), ORIN, [graphs.USUAL])


def test_what_is_no_trap_passes() -> None:
    for model in (graphs.attention("mask"), graphs.topk(3840), graphs.dequantize("int8")):
        traps.check_graph(model, ORIN, [graphs.USUAL])
    traps.check_graph(graphs.TRAPS["float8"][0](), THOR, [graphs.USUAL])  # which has it


def test_all_traps_of_a_graph_are_told_at_once() -> None:
    model = graphs.attention("lengths", "past_key", "past_value", is_causal=1, softcap=2.0)
    with pytest.raises(EngineError, match=r"is_causal.*nonpad_kv_seqlen.*past_key.*softcap"):
        traps.check_graph(model, ORIN, [])


def test_older_versions_get_no_newer_nodes() -> None:
    with pytest.raises(EngineError, match=r"Attention node .*not known to this version"):
        traps.check_graph(graphs.attention("mask"), capabilities.CONSERVATIVE, [])


@pytest.mark.parametrize(
    "said",
    [
        "Profile kMAX values are not self-consistent. node_TopK_1: K exceeds the maximum value allowed (3840).",
        "Unused Input: lengths",
        "[RemoveDeadLayers] Input Tensor lengths is unused or used only at compile-time, but is not being removed.",
    ],
)
def test_warnings_that_change_the_result_are_errors(said: str) -> None:
    with pytest.raises(EngineError, match="only warns, but this would go wrong"):
        traps.check_messages(["Make sure input x has Int64 binding.", said])
    traps.check_messages(["Make sure input x has Int64 binding."])


@pytest.fixture(scope="module")
def rtx() -> module.TensorRT:
    try:
        return module.find("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))


def compiled(rtx: module.TensorRT, model: Any, folder: Path) -> Path:
    ir.save(model, folder / "model.onnx")
    job = parse.Job(folder / "model.onnx", model, [graphs.USUAL], sm=86)
    parse.compile_plan(rtx, job, folder / "plan", lambda _: None)
    return folder / "plan"


# What TensorRT-RTX says without our check. is_causal and a zero point of 0 build silently.
SAYS = {
    "nonpad_kv_seqlen": "input of the graph is dropped",
    "past_key": "past_key",
    "softcap": "softcap",
    "dynamic K": "exceeds a limit",
    "large K": "3840",
    "NonZero": "NonZero",
    "MatMulNBits": "MatMulNBits",
    "uint4": "refuses the graph",
    "float8": "fp8_e4m3",
}


@pytest.mark.parametrize("name", SAYS)
def test_tensorrt_rtx_refuses_it_too_or_its_warning_is_an_error(
    name: str, rtx: module.TensorRT, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=SAYS[name]):
        compiled(rtx, graphs.TRAPS[name][0](), tmp_path)


@pytest.mark.parametrize("name", ["is_causal", "zero point"])
def test_what_tensorrt_rtx_takes_silently(name: str, rtx: module.TensorRT, tmp_path: Path) -> None:
    assert compiled(rtx, graphs.TRAPS[name][0](), tmp_path).stat().st_size > 0


def test_attention_of_float32_is_built_from_simpler_parts(rtx: module.TensorRT, tmp_path: Path) -> None:
    assert compiled(rtx, graphs.attention("mask", kind=ir.DataType.FLOAT), tmp_path).stat().st_size > 0
