"""Attention in blocks of queries beside attention at once, over cached, new and free columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="building an engine needs the 'ort' extra")

from fstq_engines.causal_blocks import LEAST, CausalBlocks  # noqa: E402
from fstq_engines.graph import initializer  # noqa: E402

HEADS, GROUPS, WIDTH, FREE = 4, 2, 8, 9
F = ir.DataType.FLOAT


def graph(in_blocks: bool) -> Any:
    sizes = {"q": ["b", HEADS, "q", WIDTH], "k": ["b", GROUPS, "t", WIDTH], "v": ["b", GROUPS, "t", WIDTH]}
    inputs = [ir.Value(name=n, type=ir.TensorType(F), shape=ir.Shape(shape)) for n, shape in sizes.items()]
    allowed = ir.Value(name="m", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(["b", "q", "t"]))
    before = ir.Value(name="before", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    made = ir.Graph([*inputs, allowed, before], [], nodes=[], opset_imports={"": 23}, name="attention")
    tape, blocks = ir.tape.Tape(), CausalBlocks(made)
    mask = tape.op("Unsqueeze", [allowed, initializer(made, "axes", np.array([1], np.int64))])
    out, attributes = inputs[0], {"scale": 0.3}
    for layer in range(2):
        states = [out, *inputs[1:]]
        if in_blocks:
            out = blocks.attention(tape, f"layer{layer}", states, mask, before, (HEADS, GROUPS), attributes)
        else:
            out = tape.op("Attention", [*states, mask], attributes)
    if not in_blocks:
        tape.op("Identity", [before])
    out.name, out.type, out.shape = "y", ir.TensorType(F), ir.Shape(["b", HEADS, "q", WIDTH])
    made.extend(tape.nodes)
    made.outputs.append(out)
    return made


def ran(made: ir.Graph, given: dict[str, Any]) -> Any:
    model = ir.to_proto(ir.Model(made, ir_version=11)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, given)[0]


def case(tokens: int, cached: int, window: int | None = None) -> dict[str, Any]:
    """Two rows, the second padded in front; free columns hold what a query must never see."""
    rng, columns = np.random.default_rng(tokens), cached + tokens + FREE
    shapes = {"q": (2, HEADS, tokens, WIDTH), "k": (2, GROUPS, columns, WIDTH), "v": (2, GROUPS, columns, WIDTH)}
    given: dict[str, Any] = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    given["v"][:, :, cached + tokens :] = 1e30
    seen = np.tril(np.ones((tokens, columns), bool), cached)[None].repeat(2, 0)
    if window is not None:
        seen &= ~np.tril(np.ones((tokens, columns), bool), cached - window)
    seen[-1, :, :5] = False
    return given | {"m": seen, "before": np.array([cached], np.int64)}


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cached", [0, 37])
@pytest.mark.parametrize("tokens", [1, 7, LEAST - 1, LEAST, LEAST + 1, 3 * LEAST + 5])
def test_blocks_give_what_all_at_once_gives(tokens: int, cached: int, window: int | None) -> None:
    given = case(tokens, cached, window)
    expected, found = ran(graph(False), given), ran(graph(True), given)
    rows = given["m"].any(-1)  # a query that sees nothing is padding
    np.testing.assert_allclose(found.transpose(0, 2, 1, 3)[rows], expected.transpose(0, 2, 1, 3)[rows], atol=2e-6)
    assert np.abs(expected).max() < 100


def test_no_query_of_a_long_call_reads_columns_after_its_block() -> None:
    given = case(LEAST, 3)
    given["m"][:] = True  # were all columns read, the free ones would show
    found = ran(graph(True), given)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 100


def test_layers_with_one_mask_ask_once_whether_a_call_is_long() -> None:
    made = graph(True)
    assert sum(node.op_type == "GreaterOrEqual" for node in made) == 1
    assert [node.op_type for node in made].count("If") == 2


def test_attention_without_a_mask_has_no_order_to_rely_on() -> None:
    made = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="attention")
    states = [ir.Value(name=name) for name in "qkv"]
    tape = ir.tape.Tape()
    CausalBlocks(made).attention(tape, "layer", states, None, ir.Value(name="before"), None, {})
    assert [node.op_type for node in tape.nodes] == ["Attention"]
