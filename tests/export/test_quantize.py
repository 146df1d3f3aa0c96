"""The quantize pass: what it changes in the graph, and that ONNX Runtime computes with the dequantized weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")

import onnx_ir as ir
import onnxruntime as ort
from fstq_export import decoder, reference, segments, source
from fstq_export.meter import quantize_in_place
from fstq_export.passes.quantize import METADATA, QuantizeWeights, fingerprints
from fstq_export.sensitivity import weights

from fstq_infer.errors import UnsupportedModelError
from fstq_infer.quant.codes import Quantized, quantize
from fstq_infer.quant.formats import FORMATS

from . import families

LINEAR = 7 * families.LAYERS


def codes(model: Path, form: str) -> tuple[dict[str, Quantized], dict[str, Any]]:
    """Every weight of a model in one format, and the fingerprints they are found by."""
    with reference.reference(source.resolve(str(model)), stream=False) as frozen:
        found = weights(frozen)
        made = {name: quantize(np.ascontiguousarray(one.matrix), FORMATS[form]) for name, one in found.items()}
        return made, {name: fingerprints(one.matrix) for name, one in found.items()}


def built(model: Path, form: str) -> tuple[ir.Model, dict[str, Quantized]]:
    made, prints = codes(model, form)
    return decoder.build_graph(source.resolve(str(model)), "float32", [], made, prints), made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("qwen2", tmp_path_factory.mktemp("qwen2"))


def verified(model: Path, graph: Path, made: dict[str, Quantized]) -> float:
    """Largest difference to a torch model that has the dequantized weights."""
    from fstq_export import verify

    with reference.reference(source.resolve(str(model)), stream=False) as frozen:
        quantize_in_place(frozen, made)
        prompts = [families.ids(20, 1)]
        return verify.verify(graph, decoder.GRAPH, frozen, [], [], 512, 256, "float32", 0, "tiny", prompts).dense


@pytest.mark.parametrize(
    ("form", "unpacked", "axis", "kind"),
    [
        ("int4-32", "DequantizeLinear", 1, "INT4"),
        ("int8", "DequantizeLinear", 0, "INT8"),
        ("fp8", "DequantizeLinear", 0, "FLOAT8E4M3FN"),
        ("nvfp4", "DequantizeLinear", 1, "INT8"),
        ("fp16", "Cast", None, ""),
    ],
)
def test_operators_and_types(llama: Path, form: str, unpacked: str, axis: int | None, kind: str) -> None:
    before = Counter(n.op_type for n in decoder.build_graph(source.resolve(str(llama)), "float32", []).graph)
    model, made = built(llama, form)
    after = Counter(node.op_type for node in model.graph)
    count = LINEAR + 2  # embedding and head
    assert len(made) == count
    assert after["Transpose"] - before["Transpose"] == LINEAR + 1  # an embedding is read as it is stored
    assert after[unpacked] - before[unpacked] == count
    assert {op: after[op] for op in ("MatMul", "Gather", "Attention")} == {
        op: before[op] for op in ("MatMul", "Gather", "Attention")
    }
    marked = [node for node in model.graph if node.metadata_props.get(METADATA) == form and node.op_type == "MatMul"]
    assert len(marked) == LINEAR + 1
    for node in model.graph:
        if axis is not None and node.op_type == "DequantizeLinear":
            assert node.attributes["axis"].as_int() == axis
            stored = node.inputs[0]
            assert stored is not None and stored.dtype is not None and stored.dtype.name == kind
    assert not [n for n in model.graph.initializers if n.endswith("proj.weight_t")]


@pytest.mark.parametrize("form", ["int4-32", "int4-128", "int8", "int8-dynamic", "bf16", "fp8", "nvfp4"])
def test_the_written_graph_computes_with_dequantized_weights(tied: Path, tmp_path: Path, form: str) -> None:
    model, made = built(tied, form)
    decoder.save(model, tmp_path)
    assert verified(tied, tmp_path, made) < 1e-4
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    stored = sum(FORMATS[form].bytes(*one.codes.shape) for one in made.values())
    if form == "nvfp4":  # bytes where a device has nibbles, scales of two bytes
        stored = sum(one.codes.size * 9 // 8 for one in made.values())
    assert stored < size < stored + 120_000  # norms, rotary tables and the graph itself


def test_a_tied_table_is_stored_once(tied: Path) -> None:
    model, _ = built(tied, "int4-32")
    tables = [name for name in model.graph.initializers if "embed_tokens" in name]
    assert sorted(tables) == ["model.embed_tokens.weight.codes", "model.embed_tokens.weight.scales"]


def test_unpacking_belongs_to_the_piece_that_reads(tied: Path) -> None:
    model, _ = built(tied, "int4-32")
    labels = {node.name: piece.label for piece in segments.split(model.graph) for node in piece.nodes}
    unpacking = [(name, label) for name, label in labels.items() if name and "Dequantize" in name]
    assert Counter(label for _, label in unpacking) == {
        "embedding": 1, "head": 1, **{f"layer {i}": 7 for i in range(families.LAYERS)},
    }  # fmt: skip


def test_fused_and_unfused_agree(llama: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own fusions must not change what is computed (blocks along axis 0 would: int8 activations)."""
    model, _ = built(llama, "int4-32")
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    feeds = {"input_ids": np.array([families.ids(12)]), "position_ids": np.arange(12)[None]}
    results = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level, options.intra_op_num_threads = level, 3, 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        empty = {
            i.name: np.zeros(
                [1 if a == 0 else d if isinstance(d, int) else 0 for a, d in enumerate(i.shape)],
                np.int64 if "int64" in i.type else np.float32,
            )
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        results.append(session.run(["logits"], feeds | empty)[0])
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_weights_that_the_exporter_took_apart_are_found(family: str, tmp_path: Path) -> None:
    folder = families.make(family, tmp_path / "m")
    model, made = built(folder, "int8")
    (tmp_path / "g").mkdir()
    decoder.save(model, tmp_path / "g")
    assert verified(folder, tmp_path / "g", made) < 1e-4


def test_a_weight_that_is_not_there_is_named(llama: Path) -> None:
    made, prints = codes(llama, "int8")
    made["model.layers.0.extra"] = made["model.layers.0.self_attn.q_proj"]
    prints["model.layers.0.extra"] = prints["model.layers.0.self_attn.q_proj"] + np.uint64(2)
    graph = decoder.build_graph(source.resolve(str(llama)), "float32", [])
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.extra'"):
        QuantizeWeights(made, prints)(graph)


def test_fingerprints_tell_rows_apart() -> None:
    matrix = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    prints = fingerprints(matrix)
    assert len(set(prints.tolist())) == 50
    np.testing.assert_array_equal(fingerprints(matrix[10:20]), prints[10:20])
    changed = matrix.copy()
    changed[3, 5] = np.nextafter(changed[3, 5], np.float32(9))
    assert np.flatnonzero(fingerprints(changed) != prints).tolist() == [3]
    assert not set(fingerprints(matrix[:, :4]).tolist()) & set(prints.tolist())
