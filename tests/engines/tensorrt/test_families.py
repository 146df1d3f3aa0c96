"""Every family of decoders: lowered graphs compute the same, in ONNX Runtime, and build with TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("mobius", reason="exporting needs the 'export' extra")

from fstq_engines.tensorrt import lint
from fstq_engines.tensorrt.capabilities import CONSERVATIVE
from fstq_engines.tensorrt.weights import Weights
from fstq_export import decoder, source

from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError
from fstq_infer.runtime.engine import Stage
from tests.conftest import write_bundle
from tests.engines.tensorrt.lowered import ROWS, difference, lowered, session, unpacked, widened
from tests.export import families
from tests.export.test_quantize import codes

DEMO = Path(source.__file__).parent / "demo" / "model"
ONE, TWO = (Stage(2, 1, 4),), (Stage(1, 1, 4), Stage(3, 2, 3))
KEEP = {(): (), ONE: (20,), TWO: (30, 14)}


def graph(model: Path, out: Path, stages: Sequence[Stage], form: str | None = None) -> Path:
    """The exporter's graph of a model, with random probes; form: of all its weights."""
    resolved = source.resolve(str(model))
    made, prints = codes(model, form) if form else ({}, {})
    out.mkdir(exist_ok=True)
    pruning = families.prune_stages(resolved.config, stages)
    decoder.save(decoder.build_graph(resolved, "float32", pruning, made, prints), out)
    return out


def compared(folder: Path, stages: Sequence[Stage], tmp_path: Path, dtype: str = "float32") -> dict[str, float]:
    """Difference of each row's graph to the bundle's, dense and pruned, with a padded batch."""
    plain = session(ir.load(folder / "model.onnx"), tmp_path)
    rows = [np.array(families.ids(n, n)) for n in (60, 41)]
    dense = np.array([[60 - 3] * len(stages), [41 - 3] * len(stages)]).reshape(2, len(stages))
    pruned = np.array([KEEP[tuple(stages)]] * 2).reshape(2, len(stages))
    found = {}
    for row in ROWS:
        made = unpacked(lowered(folder / "model.onnx", row, [s.layer for s in stages], dtype))
        other = session(widened(made), tmp_path)
        keeps = [dense] if dtype != "float32" or not stages else [dense, pruned]
        found[row] = max(difference(plain, other, rows, keep) for keep in keeps)
    return found


@pytest.mark.parametrize(
    "stages", [TWO, pytest.param(ONE, marks=pytest.mark.slow), pytest.param((), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_lowered_exactly(family: str, stages: tuple[Stage, ...], tmp_path: Path) -> None:
    folder = graph(families.make(family, tmp_path / "hf"), tmp_path / "graph", stages)
    (tmp_path / "sessions").mkdir()
    assert max(compared(folder, stages, tmp_path / "sessions").values()) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float16", 5e-2), ("bfloat16", 3e-1)])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_in_half_precision(family: str, dtype: str, most: float, tmp_path: Path) -> None:
    folder = graph(families.make(family, tmp_path / "hf"), tmp_path / "graph", ())
    (tmp_path / "sessions").mkdir()
    found = compared(folder, (), tmp_path / "sessions", dtype)
    assert 0 < max(found.values()) < most


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4-32", "int4-64", "fp16", "fp8", "nvfp4"])
def test_weights_in_their_formats_are_lowered_exactly(form: str, tmp_path: Path) -> None:
    folder = graph(families.make("qwen2", tmp_path / "hf"), tmp_path / "graph", ONE, form)
    (tmp_path / "sessions").mkdir()
    assert max(compared(folder, ONE, tmp_path / "sessions").values()) < 2e-4


def test_the_demo_model_is_lowered_exactly(tmp_path: Path) -> None:
    folder = graph(DEMO, tmp_path / "graph", ONE)
    (tmp_path / "sessions").mkdir()
    assert max(compared(folder, ONE, tmp_path / "sessions").values()) < 2e-4


@pytest.mark.parametrize(("columns", "block", "left"), [(160, 64, 32), (96, 128, 32), (72, 64, 0)])
def test_blocks_that_do_not_divide_a_row(columns: int, block: int, left: int, tmp_path: Path) -> None:
    """They become smaller ones with the same scales, or plain numbers; either way the same numbers."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    inits = []
    for name, array in (
        ("codes", rng.integers(-8, 8, (48, columns)).astype(ml_dtypes.int4)),
        ("scales", rng.uniform(0.5, 1, (48, -(-columns // block))).astype(np.float16)),
    ):
        tensor = ir.tensor(array, name=name)
        inits.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        )
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", columns]))
    tape = ir.tape.Tape()
    scales = tape.op("Cast", [inits[1]], {"to": int(ir.DataType.FLOAT)})
    scales.type = ir.TensorType(ir.DataType.FLOAT)
    weight = tape.op("DequantizeLinear", [inits[0], scales], {"axis": 1, "block_size": block})
    out = tape.op("MatMul", [x, tape.op("Transpose", [weight], {"perm": [1, 0]})])
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 48])
    made = ir.Model(ir.Graph([x], [out], nodes=tape.nodes, initializers=inits, opset_imports={"": 23}), ir_version=10)
    feed = {"x": rng.normal(size=(3, columns)).astype(np.float32)}
    before = session(made, tmp_path).run(None, feed)[0]
    pass_ = Weights()
    pass_(made)
    np.testing.assert_array_equal(session(made, tmp_path).run(None, feed)[0], before)
    assert (pass_.changed, pass_.widened) == ((1, 0) if left else (0, 1))
    left_over = [n.attributes["block_size"].as_int() for n in made.graph if n.op_type == "DequantizeLinear"]
    assert left_over == ([left] if left else [])


def bundle(model: Path, tmp_path: Path, stages: tuple[Stage, ...], form: str | None) -> Bundle:
    config = source.resolve(str(model)).config
    folder = graph(model, tmp_path / "graph", stages, form)
    return write_bundle(
        tmp_path / "model.bundle",
        folder,
        stages,
        layers=config.num_hidden_layers if hasattr(config, "num_hidden_layers") else families.LAYERS,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


def linted(made: Bundle, target: str = "orin-nano", **options: Any) -> lint.Report:
    try:
        return lint.lint(made, target, options={"context": min(1024, made.manifest.model.max_positions)} | options)
    except EngineError as error:
        if "needs the Python module" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize(
    ("stages", "form", "target"),
    [
        (ONE, "int4-32", "orin-nano"),
        ((), "int8", "orin-nano"),
        pytest.param(ONE, "int8", "orin-nx", marks=pytest.mark.slow),
        pytest.param(ONE, None, "orin-nano", marks=pytest.mark.slow),
        pytest.param((), "int4-128", "agx-orin", marks=pytest.mark.slow),
        pytest.param((), None, "orin-nano", marks=pytest.mark.slow),
        pytest.param(TWO, "int4-64", "sm86", marks=pytest.mark.slow),
        pytest.param(ONE, "int4-64", "thor", marks=pytest.mark.slow),
        pytest.param((), "fp8", "sm120", marks=pytest.mark.slow),
        pytest.param(ONE, "nvfp4", "thor", marks=pytest.mark.slow),
    ],
)
def test_the_demo_model_builds(stages: tuple[Stage, ...], form: str | None, target: str, tmp_path: Path) -> None:
    report = linted(bundle(DEMO, tmp_path, stages, form), target)
    assert report.plan_bytes > 1 << 16 and report.target == target
    assert report.row == ("nodes and cache update" if target.startswith("sm") else CONSERVATIVE.name)


@pytest.mark.parametrize(
    ("form", "target"),
    [
        ("int4-32", "orin-nano"),
        pytest.param("int8", "sm86", marks=pytest.mark.slow),
        pytest.param("fp8", "thor", marks=pytest.mark.slow),
        pytest.param("nvfp4", "sm120", marks=pytest.mark.slow),
        pytest.param(None, "orin-nano", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_builds(form: str | None, target: str, tmp_path: Path) -> None:
    made = bundle(families.make("qwen2", tmp_path / "hf"), tmp_path, ONE, form)
    report = linted(made, target, context=64, dtype="bfloat16")
    assert report.details["settings"]["dtype"] == "bfloat16" and report.plan_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(), ONE], ids=["dense", "pruned"])
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_family_builds(family: str, stages: tuple[Stage, ...], dtype: str, tmp_path: Path) -> None:
    assert linted(bundle(families.make(family, tmp_path / "hf"), tmp_path, stages, None), dtype=dtype).plan_bytes > 0
