"""fstq_engines.tensorrt: lowered graphs compute what the bundle's graph does, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="lowering needs onnx-ir")

from fstq_infer.bundle import Bundle  # noqa: E402
from tests.engines.tensorrt.lowered import ROWS, difference, lowered, session, widened  # noqa: E402

VOCABULARY = 96
TOLERANCE = {"float32": 2e-5, "float16": 3e-2, "bfloat16": 1e-1}


def prompts(*lengths: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, n) for n in lengths]


@pytest.fixture(scope="module")
def plain(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return session(ir.load(tiny_bundle.file("model.onnx")), tmp_path_factory.mktemp("plain"))


def graph(bundle: Bundle) -> Path:
    return bundle.file("model.onnx")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("lengths", "keep"),
    [
        ((60,), [[60, 60]]),
        ((60,), [[24, 11]]),
        ((60, 37), [[30, 20], [19, 9]]),
        ((60,), [[-600_000, -500_000]]),
        ((4,), [[1, 1]]),
    ],
    ids=["dense", "pruned", "padded", "adaptive", "one token"],
)
def test_lowered_graphs_compute_the_same(
    row: str, lengths: tuple[int, ...], keep: list[list[int]], tiny_bundle: Bundle, plain: Any, tmp_path: Path
) -> None:
    other = session(lowered(graph(tiny_bundle), row, [1, 3]), tmp_path)
    assert difference(plain, other, prompts(*lengths), np.array(keep)) < TOLERANCE["float32"]


@pytest.mark.parametrize("row", ROWS)
def test_bfloat16_stays_near(row: str, tiny_bundle: Bundle, plain: Any, tmp_path: Path) -> None:
    made = lowered(graph(tiny_bundle), row, [1, 3], "bfloat16")
    kinds = {value.dtype for node in made.graph for value in node.inputs if value is not None}
    assert ir.DataType.BFLOAT16 in kinds and ir.DataType.FLOAT16 not in kinds
    found = difference(plain, session(widened(made), tmp_path), prompts(60), np.array([[60, 60]]))
    assert 1e-4 < found < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("row", ROWS)
def test_half_precision_stays_near(row: str, tiny_bundle: Bundle, plain: Any, tmp_path: Path) -> None:
    other = session(lowered(graph(tiny_bundle), row, [1, 3], "float16"), tmp_path)
    found = difference(plain, other, prompts(60), np.array([[60, 60]]))
    assert 1e-5 < found < TOLERANCE["float16"]
