"""fstq_engines.grouped_queries: the same numbers as plain Attention, for one token and for many; what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="building an engine needs the 'ort' extra")

from fstq_engines.graph import initializer  # noqa: E402
from fstq_engines.grouped_queries import GroupedQueries  # noqa: E402

WIDTH, CACHED = 8, 24
F = ir.DataType.FLOAT


def graph(
    heads: int, groups: int, known: tuple[int, int] | None, axis: int | None = 1, layers: int = 1, single: bool = False
) -> Any:
    """Layers of Attention one after the other, their mask unsqueezed along ``axis``; None: no mask."""
    ports = {"q": heads, "k": groups, "v": groups}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(F), shape=ir.Shape(["b", count, name, WIDTH]))
        for name, count in ports.items()
    ]
    flat = ir.Value(name="m", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(["b", "q", "k"]))
    made = ir.Graph([*inputs, flat], [], nodes=[], opset_imports={"": 24}, name="attention")
    tape, grouped = ir.tape.Tape(), GroupedQueries(made, single)
    mask = None
    if axis is not None:
        mask = tape.op("Unsqueeze", [flat, initializer(made, "axes", np.array([axis], np.int64))])
    out = inputs[0]
    for _ in range(layers):
        out = grouped.way(tape, [out, *inputs[1:]], mask, known, {"scale": 0.3})(tape)
    out.name, out.type, out.shape = "y", ir.TensorType(F), ir.Shape(["b", heads, "q", WIDTH])
    made.extend(tape.nodes)
    made.outputs.append(out)
    return made


def ran(made: Any, tokens: int, batch: int) -> Any:
    """Left-padded rows that see all of the cache, and of themselves what came before."""
    model = ir.to_proto(ir.Model(made, ir_version=11)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(tokens)
    given = {
        port.name: rng.normal(
            size=[batch, port.shape[1], tokens if port.name == "q" else CACHED + tokens, WIDTH]
        ).astype(np.float32)
        for port in session.get_inputs()[:3]
    }
    seen = np.tril(np.ones((tokens, CACHED + tokens), bool), CACHED)[None].repeat(batch, 0)
    seen[-1, :, :5] = False
    return session.run(None, given | {"m": seen})[0]


@pytest.mark.parametrize("single", [False, True], ids=["truth values", "numbers"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize(("heads", "groups"), [(14, 2), (4, 1), (6, 3)])
def test_grouped_heads_give_what_heads_alone_give(
    heads: int, groups: int, tokens: int, batch: int, single: bool
) -> None:
    plain, grouped = graph(heads, groups, None), graph(heads, groups, (heads, groups), single=single)
    assert sum(node.op_type == "Reshape" for node in grouped) == 2
    expected = ran(plain, tokens, batch)
    np.testing.assert_allclose(ran(grouped, tokens, batch), expected, atol=2e-6)
    assert not np.allclose(expected[:, 0], expected[:, -1], atol=1e-2)


def test_layers_with_one_mask_share_what_it_needs() -> None:
    made = graph(4, 2, (4, 2), layers=3)
    assert sum(node.op_type == "Expand" for node in made) == 1
    np.testing.assert_allclose(ran(made, 1, 2), ran(graph(4, 2, None, layers=3), 1, 2), atol=2e-6)


@pytest.mark.parametrize(
    ("known", "axis"),
    [(None, 1), ((4, 4), 1), ((5, 2), 1), ((4, 2), None), ((4, 2), 0)],
    ids=["heads not known", "no shared heads", "heads do not divide", "no mask", "a place for heads in the mask"],
)
def test_other_attention_stays_as_it_is(known: tuple[int, int] | None, axis: int | None) -> None:
    made = graph(4, 4 if known == (4, 4) else 2, known, axis)
    assert [node.op_type for node in made if node.op_type != "Unsqueeze"] == ["Attention"]
