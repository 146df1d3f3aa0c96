"""Graph passes one by one: what they change in the graph, and that ONNX Runtime then computes what torch does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")

import onnx_ir as ir
import onnxruntime as ort
import torch
from fstq_export import source
from fstq_export.passes import pruning
from fstq_export.passes.last_token import LastTokenLogits
from fstq_export.passes.positions import KeyPositions
from fstq_export.passes.probe import Tokens
from fstq_export.passes.pruning import PruneStage, TokenPruning
from fstq_export.passes.rotary import RotaryTables
from fstq_export.passes.scope import Emit, attention_nodes, crossing, int64, layer_of
from fstq_export.passes.tied_head import TiedHead
from fstq_export.reference import rotary_module
from hypothesis import given, settings
from hypothesis import strategies as st
from mobius import build
from onnx_ir.passes import PreconditionError
from transformers import AutoModelForCausalLM

from fstq_infer.errors import UnsupportedModelError
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.select import keep_count, mass_count, select
from fstq_infer.runtime.engine import Stage

from . import families
from .families import Runner, batch, ids

WINDOW = 8
STAGE = Stage(2, 2, WINDOW)
TWO = (Stage(1, 1, 4), Stage(3, 2, WINDOW))
FULL: tuple[int | None, ...] = (None,) * families.LAYERS


@dataclass(frozen=True)
class Llama:
    """The tiny Llama in torch, and its folder."""

    folder: Path
    model: Any

    def dense(self) -> ir.Model:
        """A fresh copy of the exporter's graph."""
        return dense_graph(self.folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = families.make("llama", tmp_path_factory.mktemp("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return Llama(folder, model.eval().requires_grad_(False))


def dense_graph(folder: Path) -> ir.Model:
    model: ir.Model = build(str(folder), task="text-generation", dtype="f32", execution_provider="onnx-standard")[
        "model"
    ]
    return model


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def positioned(llama: Llama, stages: Sequence[Stage] = (), windows: Sequence[int | None] = FULL) -> ir.Model:
    """The tiny Llama through KeyPositions and, with random probes, TokenPruning."""
    model = llama.dense()
    KeyPositions(windows)(model)
    TokenPruning(families.prune_stages(llama.model.config, stages), windows)(model)
    return model


def keep_of(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, np.int64)


# --- key positions ---------------------------------------------------------------------------------------------------


def test_key_positions_change_inputs_and_outputs(llama: Llama) -> None:
    model = llama.dense()
    before = ops(model)
    old_inputs, old_outputs = names(model.graph.inputs), names(model.graph.outputs)
    assert KeyPositions(FULL)(model).modified
    assert names(model.graph.inputs) == [n for n in old_inputs if n != "attention_mask"] + ["past_positions.0"]
    assert names(model.graph.outputs) == [*old_outputs, "present_positions.0"]
    after = ops(model)
    inside = ("Attention", "MatMul", "RotaryEmbedding", "RMSNormalization")
    assert {op: after[op] for op in inside} == {op: before[op] for op in inside}
    assert {node.attributes["is_causal"].as_int() for node in attention_nodes(model.graph).values()} == {0}
    assert len({node.inputs[3] for node in attention_nodes(model.graph).values()}) == 1


def expose_masks(model: ir.Model) -> list[str]:
    """Make every layer's mask an output; returns their names by layer."""
    masks = [node.inputs[3] for node in attention_nodes(model.graph).values()]
    for mask in dict.fromkeys(masks):
        assert mask is not None
        model.graph.outputs.append(mask)
    return names([mask for mask in masks if mask is not None])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_key_position_masks_equal_the_exporters(name: str, tmp_path: Path) -> None:
    folder = families.make(name, tmp_path / "model")
    windows = source.resolve(str(folder)).windows
    old, new = dense_graph(folder), dense_graph(folder)
    KeyPositions(windows)(new)
    old_masks, new_masks = expose_masks(old), expose_masks(new)
    was, now = Runner(old, tmp_path), Runner(new, tmp_path)
    tokens, positions = batch([ids(50, 1), ids(41, 2)])
    valid = positions >= 0
    for cut in (slice(0, 45), slice(45, 49), slice(49, 50)):
        kept = {"input_ids": tokens[:, cut]}
        wanted = was(
            **kept, position_ids=np.maximum(positions[:, cut], 0), attention_mask=valid[:, : cut.stop].astype(np.int64)
        )
        found = now(**kept, position_ids=positions[:, cut])
        columns, rows = np.arange(cut.stop), np.arange(cut.stop)[cut]
        causal = columns[None] <= rows[:, None]
        for layer in range(families.LAYERS):
            mask = wanted[old_masks[layer]]
            allowed = (mask if mask.dtype == bool else mask > -1.0) & causal
            mine = found[new_masks[layer]]
            assert mine.dtype == bool
            np.testing.assert_array_equal(mine[:, 0][valid[:, cut]], allowed[:, 0][valid[:, cut]])
            assert mine.any(-1).all()  # padding, too, sees something
        np.testing.assert_allclose(found["logits"][valid[:, cut]], wanted["logits"][valid[:, cut]], atol=2e-4)
        np.testing.assert_array_equal(found["present_positions.0"], positions[:, : cut.stop])


def test_key_positions_give_windows_to_their_layers(llama: Llama, tmp_path: Path) -> None:
    model = positioned(llama, windows=(None, 4, 9, 4))
    masks = expose_masks(model)
    assert masks[1] == masks[3] and len(set(masks)) == 3
    found = Runner(model, tmp_path)(input_ids=np.array([ids(20)]), position_ids=np.arange(20)[None])
    distance = np.arange(20)[:, None] - np.arange(20)[None]
    for layer, window in enumerate((20, 4, 9, 4)):
        np.testing.assert_array_equal(found[masks[layer]][0, 0], (distance >= 0) & (distance < window))


def test_key_positions_preconditions(llama: Llama) -> None:
    model = llama.dense()
    with pytest.raises(PreconditionError, match="3 layer windows for 4 decoder layers"):
        KeyPositions((None,) * 3)(model)
    KeyPositions(FULL)(model)
    with pytest.raises(PreconditionError, match=r"no input attention_mask .*found input_ids"):
        KeyPositions(FULL)(model)


def test_a_mask_that_is_read_elsewhere_is_refused(llama: Llama) -> None:
    model = llama.dense()
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    node = ir.node("Shape", [mask], name="model/odd")
    node.outputs[0].name = "odd"
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    with pytest.raises(PreconditionError, match="masks are not understood"):
        KeyPositions(FULL)(model)


# --- last token ------------------------------------------------------------------------------------------------------


def test_last_token_logits(llama: Llama, tmp_path: Path) -> None:
    dense, short = positioned(llama), positioned(llama)
    before = ops(short)
    LastTokenLogits()(short)
    assert ops(short) - before == Counter({"Slice": 1}) and not before - ops(short)
    logits = next(v for v in short.graph.outputs if v.name == "logits")
    assert logits.shape is not None and logits.shape[1] == 1 and logits.shape[2] == families.VOCABULARY
    tokens, positions = batch([ids(12), ids(9)])
    wanted = Runner(dense, tmp_path)(input_ids=tokens, position_ids=positions)["logits"]
    found = Runner(short, tmp_path)(input_ids=tokens, position_ids=positions)["logits"]
    np.testing.assert_allclose(found, wanted[:, -1:], atol=1e-5)


# --- tied head -------------------------------------------------------------------------------------------------------


def large(model: ir.Model) -> list[str]:
    """Initializers as large as the embedding."""
    size = families.VOCABULARY * families.WIDTH
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return [name for name, tensor in tensors.items() if tensor is not None and tensor.size == size]


def test_tied_head_keeps_one_copy(tmp_path: Path) -> None:
    folder = families.make("llama", tmp_path / "model", tie_word_embeddings=True)
    two, one = dense_graph(folder), dense_graph(folder)
    for model in (two, one):
        KeyPositions(FULL)(model)
        LastTokenLogits()(model)
    before = ops(one)
    assert TiedHead(True)(one).modified
    assert large(one) == ["model.embed_tokens.weight"]
    assert ops(one) - before == Counter({"Gemm": 1, "Squeeze": 1, "Unsqueeze": 1})
    assert before - ops(one) == Counter({"MatMul": 1, "Transpose": 1})
    assert one.graph.outputs[0].shape == two.graph.outputs[0].shape
    assert names(one.graph.outputs) == names(two.graph.outputs)
    tokens, positions = batch([ids(12), ids(9)])
    wanted = Runner(two, tmp_path)(input_ids=tokens, position_ids=positions)["logits"]
    found = Runner(one, tmp_path)(input_ids=tokens, position_ids=positions)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_head_leaves_others(llama: Llama, tied: bool, tmp_path: Path) -> None:
    model = positioned(llama)
    LastTokenLogits()(model)
    if tied:  # said to be tied, but the head has another shape: nothing to share
        head = next(n for n in model.graph if (n.name or "").startswith("lm_head"))
        assert head.inputs[1] is not None
        head.inputs[1].shape = ir.Shape([families.WIDTH, families.VOCABULARY + 1])
    before, kept = ops(model), large(model)
    assert not TiedHead(tied)(model).modified
    assert ops(model) == before and large(model) == kept


# --- rotary tables ---------------------------------------------------------------------------------------------------


def tables(model: ir.Model) -> dict[str, np.ndarray]:
    """cos and sin tables by name."""
    found = {name: value for name, value in model.graph.initializers.items() if "rotary_emb" in name}
    return {name: value.const_value.numpy() for name, value in found.items() if value.const_value is not None}


def test_right_rotary_tables_are_left(llama: Llama) -> None:
    model = llama.dense()
    before = tables(model)
    assert len(before) == 2
    step = RotaryTables(rotary_module(llama.model.config), None, families.POSITIONS)
    assert not step(model).modified and not step.mended
    assert all(np.array_equal(before[name], table) for name, table in tables(model).items())


def test_spoiled_rotary_tables_are_mended(llama: Llama) -> None:
    model = llama.dense()
    right = tables(model)
    spoiled = sorted(right)[0]
    value = model.graph.initializers[spoiled]
    value.const_value = ir.tensor(right[spoiled][:, ::-1].copy(), name=spoiled)
    step = RotaryTables(rotary_module(llama.model.config), None, families.POSITIONS)
    assert step(model).modified and step.mended == [spoiled]
    for name, table in tables(model).items():
        np.testing.assert_allclose(table, right[name], atol=1e-5)


def test_each_layer_type_has_its_own_rotary_table(tmp_path: Path) -> None:
    folder = families.make("gemma3", tmp_path)
    config, model = source.resolve(str(folder)).config, dense_graph(folder)
    RotaryTables(rotary_module(config), config.layer_types, families.POSITIONS)(model)
    found = tables(model)
    for layer, kind in enumerate(config.layer_types):
        base = config.rope_parameters[kind]["rope_theta"]
        name = "model.rotary_emb_local.cos_cache" if layer % 2 == 0 else "model.rotary_emb.cos_cache"
        angles = np.arange(families.POSITIONS)[:, None] * base ** -(np.arange(8) / 8)
        np.testing.assert_allclose(found[name], np.cos(angles), atol=1e-4)


def test_rotary_rows_that_no_position_reaches_go(llama: Llama, tmp_path: Path) -> None:
    model = positioned(llama)
    before = tables(model)
    assert RotaryTables(rotary_module(llama.model.config), None, 30)(model).modified
    for name, table in tables(model).items():
        np.testing.assert_allclose(table, before[name][:30], atol=1e-5)
        assert model.graph.initializers[name].shape == ir.Shape([30, 8])
    Runner(model, tmp_path)(input_ids=np.array([ids(30)]), position_ids=np.arange(30)[None])


def test_angles_in_pairs_are_read_from_the_model(tmp_path: Path) -> None:
    folder = families.make("cohere", tmp_path)
    config, model = source.resolve(str(folder)).config, dense_graph(folder)
    right = tables(model)
    RotaryTables(rotary_module(config), None, families.POSITIONS)(model)
    nodes = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert {node.attributes["interleaved"].as_int() for node in nodes} == {1}
    for name, table in tables(model).items():
        np.testing.assert_allclose(table, right[name], atol=1e-5)


def test_a_model_without_rotary_embedding_is_left(llama: Llama) -> None:
    assert not RotaryTables(None, None, families.POSITIONS)(llama.dense()).modified


# --- token pruning: structure ----------------------------------------------------------------------------------------


def test_pruning_changes_inputs_and_outputs(llama: Llama) -> None:
    model = positioned(llama, TWO)
    before = ops(positioned(llama))
    inputs, outputs = names(model.graph.inputs), names(model.graph.outputs)
    assert inputs[:3] == ["input_ids", "position_ids", "keep"]
    assert [n for n in inputs if n.startswith("past_positions")] == [f"past_positions.{g}" for g in range(3)]
    assert [n for n in outputs if n.startswith("kept")] == ["kept_indices.1", "kept_indices.2"]
    assert [n for n in outputs if n.startswith("present_positions")] == [f"present_positions.{g}" for g in range(3)]
    after = ops(model)
    assert after["Attention"] == before["Attention"] and after["RotaryEmbedding"] == before["RotaryEmbedding"]
    assert after["TopK"] == 4 and after["Conv"] == 2 * 4 + 1  # one of the probes has a span
    dims = {v.name: v.shape[2] for v in model.graph.inputs if v.shape is not None and len(v.shape) == 4}
    assert [str(dims[f"past_key_values.{layer}.key"]) for layer in range(4)] == ["past_0", "past_1", "past_1", "past_2"]
    scopes = {(n.name or "").split("/")[1] for n in model.graph if (n.name or "").startswith("fstq/")}
    assert scopes == {"positions", "prune.1", "prune.2"}


def test_without_stages_nothing_changes(llama: Llama) -> None:
    model = llama.dense()
    KeyPositions(FULL)(model)
    before = ops(model)
    assert not TokenPruning((), FULL)(model).modified
    assert ops(model) == before


@pytest.mark.parametrize("layers", [(0,), (4,), (2, 1), (2, 2)])
def test_prune_layers_must_rise_inside_the_decoder(llama: Llama, layers: tuple[int, ...]) -> None:
    model = llama.dense()
    KeyPositions(FULL)(model)
    stages = families.prune_stages(llama.model.config, [Stage(layer, 1, 4) for layer in layers])
    with pytest.raises(PreconditionError, match=r"prune layers must rise and lie in 1\.\.3"):
        TokenPruning(stages, FULL)(model)


def test_pruning_needs_key_positions(llama: Llama) -> None:
    stages = families.prune_stages(llama.model.config, [STAGE])
    with pytest.raises(PreconditionError, match="run KeyPositions first"):
        TokenPruning(stages, FULL)(llama.dense())


def test_a_side_input_that_is_not_understood_is_refused(llama: Llama) -> None:
    model = llama.dense()
    KeyPositions(FULL)(model)
    ids_input = model.graph.inputs[0]
    node = ir.node("Cast", [ids_input], attributes={"to": int(ir.DataType.FLOAT)}, name="model/odd")
    node.outputs[0].name = "odd"
    model.graph.insert_before(model.graph[0], [node])
    late = next(n for n in model.graph if layer_of(n) == 3 and n.op_type == "Mul")
    late.replace_input_with(0, node.outputs[0])
    with pytest.raises(UnsupportedModelError, match=r"layers from 2 on read odd \(Cast\)"):
        TokenPruning(families.prune_stages(llama.model.config, [STAGE]), FULL)(model)


def test_layers_without_attention_are_named(llama: Llama) -> None:
    model = llama.dense()
    attention_nodes(model.graph)[2].op_type = "Scan"
    with pytest.raises(UnsupportedModelError, match="decoder layer 2 of 4 has no Attention node"):
        attention_nodes(model.graph)


def test_two_residuals_are_refused(llama: Llama) -> None:
    model = llama.dense()
    early = next(n for n in model.graph if layer_of(n) == 0 and n.op_type == "MatMul").outputs[0]
    late = next(n for n in model.graph if layer_of(n) == 3 and n.op_type == "Mul")
    late.replace_input_with(0, early)
    with pytest.raises(UnsupportedModelError, match="from decoder layer 1 to 2, found 2"):
        crossing(model.graph, 2)


def test_constants_of_one_name_hold_one_value() -> None:
    emit = Emit(ir.Graph([], [], nodes=[], name="g"), "fstq/test")
    values = [emit.const(np.full(40, i, np.float32)) for i in range(20)]  # large ones are named by their content
    assert [float(v.const_value.numpy()[0]) for v in values if v.const_value is not None] == list(range(20))
    assert emit.const(np.full(40, 3, np.float32)) is values[3]


# --- token pruning: numbers ------------------------------------------------------------------------------------------


def reference_logits(
    llama: Llama, tokens: Sequence[int], prompt: int, cuts: dict[int, np.ndarray], sliding: Sequence[int | None] = FULL
) -> np.ndarray:
    """(steps + 1, vocab) logits after the prompt and each later token, by really taking tokens out layer by layer.

    cuts: prune layer -> columns of the prompt that stay. Independent of the exporter and of the hooks.
    """
    base = llama.model.model
    columns = np.arange(len(tokens))
    with torch.no_grad():
        hidden = base.embed_tokens(torch.tensor([list(tokens)]))
        for number, layer in enumerate(base.layers):
            if number in cuts:
                stay = np.flatnonzero(np.isin(columns, cuts[number]) | (columns >= prompt))
                columns, hidden = columns[stay], hidden[:, stay]
            distance = torch.from_numpy(columns[:, None] - columns[None])
            seen = (distance >= 0) & (distance < (sliding[number] or len(tokens)))
            mask = torch.zeros(distance.shape).masked_fill(~seen, -1e9)[None, None]
            positions = torch.from_numpy(columns)[None]
            angles = base.rotary_emb(hidden, positions)
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = llama.model.lm_head(base.norm(hidden))[0]
    return np.asarray(logits[len(np.flatnonzero(columns < prompt)) - 1 :].numpy())


def generate(
    run: Runner, prompts: Sequence[Sequence[int]], keep: np.ndarray, following: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """((B, steps + 1, vocab) logits, outputs of the prompt's call) when ``following`` is fed after the prompts."""
    tokens, positions = batch(prompts)
    first = run.fresh(input_ids=tokens, position_ids=positions, keep=keep)
    logits = [first["logits"][:, -1]]
    for step in range(following.shape[1]):
        at = np.array([[len(p) + step] for p in prompts])
        logits.append(
            run(input_ids=following[:, step : step + 1], position_ids=at, keep=np.ones_like(keep))["logits"][:, -1]
        )
    return np.stack(logits, 1), first


def stays(kept: np.ndarray, pad: int) -> np.ndarray:
    """Columns of the row's own prompt, from a row of kept_indices."""
    return kept[kept >= 0] - pad


@pytest.fixture(scope="module")
def one_stage(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(positioned(llama, [STAGE]), tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_stages(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(positioned(llama, TWO), tmp_path_factory.mktemp("two"))


FOLLOWING = np.array([ids(6, 11), ids(6, 12), ids(6, 13)])


def test_keeping_all_is_dense(llama: Llama, one_stage: Runner, tmp_path: Path) -> None:
    dense = Runner(positioned(llama), tmp_path)
    tokens, positions = batch([ids(30, 1), ids(21, 2)])
    wanted = dense(input_ids=tokens, position_ids=positions)
    found = one_stage.fresh(input_ids=tokens, position_ids=positions, keep=keep_of([30], [30]))
    valid = positions >= 0
    np.testing.assert_allclose(found["logits"][valid], wanted["logits"][valid], atol=1e-5)
    np.testing.assert_array_equal(found["kept_indices.1"], np.where(valid, np.arange(30), -1))
    for layer in range(families.LAYERS):
        for part in ("key", "value"):
            mine, theirs = found[f"present.{layer}.{part}"], wanted[f"present.{layer}.{part}"]
            np.testing.assert_allclose(mine.swapaxes(1, 2)[valid], theirs.swapaxes(1, 2)[valid], atol=1e-5)


@pytest.mark.parametrize("keep", [10, 11, 17, 29, 30, 1000])
def test_kept_shapes_and_order(one_stage: Runner, keep: int) -> None:
    tokens, positions = batch([ids(30, 3)])
    found = one_stage.fresh(input_ids=tokens, position_ids=positions, keep=keep_of([keep]))
    size = min(keep, 30)
    kept = found["kept_indices.1"]
    assert kept.shape == (1, size) and (np.diff(kept[0]) > 0).all()
    assert {0, 1, *range(30 - WINDOW, 30)} <= set(kept[0].tolist())
    np.testing.assert_array_equal(found["present_positions.0"], positions)
    np.testing.assert_array_equal(found["present_positions.1"], kept)
    for layer in range(families.LAYERS):
        assert found[f"present.{layer}.key"].shape == (1, 2, 30 if layer < STAGE.layer else size, 16)
        assert found[f"present.{layer}.value"].shape == found[f"present.{layer}.key"].shape
    assert found["logits"].shape[1] == size  # no LastTokenLogits here


def test_padded_rows_equal_single_runs(one_stage: Runner) -> None:
    prompts, keep = [ids(33, 1), ids(24, 2), ids(15, 3, high=9)], keep_of([20], [24], [11])
    together, first = generate(one_stage, prompts, keep, FOLLOWING)
    for row, prompt in enumerate(prompts):
        alone, single = generate(one_stage, [prompt], keep[row : row + 1], FOLLOWING[row : row + 1])
        pad = 33 - len(prompt)
        kept = first["kept_indices.1"][row]
        np.testing.assert_array_equal(stays(kept, pad), single["kept_indices.1"][0])
        count = int((kept >= 0).sum())
        assert count == keep[row, 0] and (kept[: len(kept) - count] == -1).all()
        np.testing.assert_array_equal(first["present_positions.1"][row], np.where(kept >= 0, kept - pad, -1))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_two_stages_with_other_keeps_per_row(two_stages: Runner) -> None:
    prompts, keep = [ids(33, 1), ids(24, 2), ids(15, 3, high=9)], keep_of([20, 12], [24, 11], [13, 13])
    together, first = generate(two_stages, prompts, keep, FOLLOWING)
    assert first["kept_indices.1"].shape == (3, 24) and first["kept_indices.2"].shape == (3, 13)
    for row, prompt in enumerate(prompts):
        alone, single = generate(two_stages, [prompt], keep[row : row + 1], FOLLOWING[row : row + 1])
        for stage in (1, 2):
            kept = first[f"kept_indices.{stage}"][row]
            np.testing.assert_array_equal(stays(kept, 33 - len(prompt)), single[f"kept_indices.{stage}"][0])
            assert (np.diff(kept[kept >= 0]) > 0).all() and (kept >= 0).sum() == keep[row, stage - 1]
        assert set(first["kept_indices.2"][row]) - {-1} <= set(first["kept_indices.1"][row])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_decoding_goes_on_like_torch(llama: Llama, one_stage: Runner, two_stages: Runner) -> None:
    prompt = ids(33, 5)
    for run, stages, keep in ((one_stage, [STAGE], [14]), (two_stages, TWO, [19, 12])):
        found, first = generate(run, [prompt], keep_of(keep), FOLLOWING[:1])
        cuts = {stage.layer: first[f"kept_indices.{i}"][0] for i, stage in enumerate(stages, 1)}
        assert [len(cut) for cut in cuts.values()] == keep
        wanted = reference_logits(llama, [*prompt, *FOLLOWING[0]], 33, cuts)
        np.testing.assert_allclose(found[0], wanted, atol=1e-4)
        unpruned = reference_logits(llama, [*prompt, *FOLLOWING[0]], 33, {})
        assert np.abs(found[0] - unpruned).max() > 0.1  # or the test would show nothing


def test_pruning_under_sliding_windows(llama: Llama, tmp_path: Path) -> None:
    windows = (None, 7, 12, 7)
    run = Runner(positioned(llama, [STAGE], windows), tmp_path)
    prompt = ids(33, 5)
    found, first = generate(run, [prompt], keep_of([18]), FOLLOWING[:1])
    wanted = reference_logits(llama, [*prompt, *FOLLOWING[0]], 33, {2: first["kept_indices.1"][0]}, windows)
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


def test_kept_keys_have_their_original_rotary_positions(one_stage: Runner) -> None:
    tokens, positions = batch([ids(30, 3)])
    dense = one_stage.fresh(input_ids=tokens, position_ids=positions, keep=keep_of([30]))
    found = one_stage.fresh(input_ids=tokens, position_ids=positions, keep=keep_of([13]))
    kept = found["kept_indices.1"][0]
    first_late = f"present.{STAGE.layer}.key"  # that layer's input is still the dense one
    np.testing.assert_allclose(found[first_late], dense[first_late][:, :, kept], atol=1e-5)


def test_a_second_turn_is_pruned_on_its_own(llama: Llama, one_stage: Runner) -> None:
    prompt, turn = ids(30, 3), ids(20, 4)
    first = one_stage.fresh(input_ids=np.array([prompt]), position_ids=np.arange(30)[None], keep=keep_of([13]))
    second = one_stage(input_ids=np.array([turn]), position_ids=np.arange(30, 50)[None], keep=keep_of([12]))
    assert second["kept_indices.1"].shape == (1, 12)
    np.testing.assert_array_equal(
        second["present_positions.1"][0], [*first["kept_indices.1"][0], *(second["kept_indices.1"][0] + 30)]
    )
    cut = np.concatenate([first["kept_indices.1"][0], second["kept_indices.1"][0] + 30])
    wanted = reference_logits(llama, [*prompt, *turn], 50, {2: cut})
    np.testing.assert_allclose(second["logits"][0, -1], wanted[0], atol=1e-4)


def test_without_sinks_padding_stays_finite(llama: Llama, tmp_path: Path) -> None:
    model = positioned(llama, [Stage(2, 0, 4)], (None, None, 5, None))
    masks = expose_masks(model)
    run = Runner(model, tmp_path)
    tokens, positions = batch([ids(30, 1), ids(18, 2)])
    found = run(input_ids=tokens, position_ids=positions, keep=keep_of([12], [6]))
    assert 0 not in found["present_positions.1"]  # or the test would show nothing
    assert all(found[mask].any(-1).all() for mask in masks)  # a softmax over nothing may be NaN, which spreads
    assert all(np.isfinite(value).all() for value in found.values())


# --- the probe in the graph ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scoring(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Probe, str]:
    """A graph that gives its scores as an output, and the same probe in torch."""
    recorded: list[ir.Value] = []
    original = pruning.probe_scores

    def record(*args: Any) -> ir.Value:
        recorded.append(original(*args))
        return recorded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "probe_scores", record)
        model = positioned(llama, [STAGE])
    model.graph.outputs.append(recorded[0])
    probe = families.random_probe(llama.model.config, WINDOW, 1)
    return Runner(model, tmp_path_factory.mktemp("scores")), probe, str(recorded[0].name)


def torch_scores(llama: Llama, probe: Probe, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        valid = torch.from_numpy(positions >= 0)
        seen = llama.model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=valid.long(),
            position_ids=torch.from_numpy(np.maximum(positions, 0)),
            output_hidden_states=True,
            output_attentions=True,
        )
        x = ProbeInput.of(
            seen.hidden_states[STAGE.layer],
            seen.hidden_states[0],
            seen.attentions[STAGE.layer - 1][:, :, -probe.queries :],
            torch.from_numpy(tokens),
            valid,
        )
        return np.asarray(probe(x).numpy())


@pytest.mark.parametrize("size", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 40])
def test_probe_scores_equal_torch(llama: Llama, scoring: tuple[Runner, Probe, str], size: int) -> None:
    run, probe, name = scoring
    tokens, positions = batch([ids(size, 7, high=12)])
    found = run.fresh(input_ids=tokens, position_ids=positions, keep=keep_of([size]))[name]
    wanted = torch_scores(llama, probe, tokens, positions)
    assert found.shape == (1, size) and (size < 10 or wanted.std() > 0.05)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("sizes", [(40, 29, 12), (12, WINDOW, 5), (40, 1, 3)])
def test_probe_scores_of_padded_rows(llama: Llama, scoring: tuple[Runner, Probe, str], sizes: tuple[int, ...]) -> None:
    run, probe, name = scoring
    prompts = [ids(size, seed, high=14) for seed, size in enumerate(sizes)]
    tokens, positions = batch(prompts)
    valid = positions >= 0
    found = run.fresh(input_ids=tokens, position_ids=positions, keep=np.full((3, 1), max(sizes)))[name]
    np.testing.assert_allclose(found[valid], torch_scores(llama, probe, tokens, positions)[valid], atol=1e-4)
    for row, prompt in enumerate(prompts):
        alone = torch_scores(llama, probe, *batch([prompt]))
        np.testing.assert_allclose(found[row][valid[row]], alone[0], atol=1e-4)


def test_the_untrained_probe_is_window_attention(llama: Llama, tmp_path: Path) -> None:
    model = llama.dense()
    KeyPositions(FULL)(model)
    probe = Probe.untrained(families.WIDTH, families.HEADS, WINDOW)
    TokenPruning([PruneStage(STAGE, probe.arrays(), probe.queries)], FULL)(model)
    tokens, positions = batch([ids(40, 9)])
    found = Runner(model, tmp_path)(input_ids=tokens, position_ids=positions, keep=keep_of([20]))
    wanted = select(torch_scores(llama, probe, tokens, positions)[0], 20, STAGE.sink, WINDOW)
    np.testing.assert_array_equal(found["kept_indices.1"][0], wanted)


# --- selection -------------------------------------------------------------------------------------------------------


def chooser(sink: int, window: int) -> ort.InferenceSession:
    """A graph of the selection alone: scores, positions and keep -> columns and whether they count."""
    scores = ir.Value(name="scores", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "tokens"]))
    positions, keep = int64("positions", ["batch", "tokens"]), int64("keep", ["batch", 1])
    graph = ir.Graph([scores, positions, keep], [], nodes=[], name="choose", opset_imports={"": 24})
    emit = Emit(graph, "fstq/test")
    valid = emit("GreaterOrEqual", positions, emit.ints(0))
    tokens = Tokens(positions, positions, valid, scores, scores)
    columns, counts = pruning._choose(emit, scores, tokens, keep, Stage(1, sink, window), SCALE)
    graph.extend(emit.nodes)
    for value, kind in ((columns, ir.DataType.INT64), (counts, ir.DataType.BOOL)):
        value.dtype = kind
        graph.outputs.append(value)
    return ort.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), providers=["CPUExecutionProvider"]
    )


FORCED, SCALE = ((0, 1), (1, 4), (3, 2)), 3.0


@pytest.fixture(scope="module")
def choosers() -> dict[tuple[int, int], ort.InferenceSession]:
    return {forced: chooser(*forced) for forced in FORCED}


@st.composite
def batches(draw: st.DrawFn) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray]:
    """(sink and window, lengths (B,), scores (B, S), keep (B, 1)): many ties, extremes, short rows, any legal keep."""
    forced = draw(st.sampled_from(FORCED))
    size = draw(st.integers(1, 24))
    lengths = np.array([size, *draw(st.lists(st.integers(1, size), max_size=3))])
    levels = draw(st.lists(st.sampled_from([-1e20, -1.0, 0.0, 1.0, 1e20]), min_size=1, max_size=12))
    scores = np.resize(np.array(levels, np.float32), (len(lengths), size))
    ratios = draw(st.lists(st.floats(0.01, 1), min_size=len(lengths), max_size=len(lengths)))
    keep = np.array([[keep_count(int(n), ratio, *forced)] for n, ratio in zip(lengths, ratios, strict=True)])
    return forced, lengths, scores, keep


@settings(max_examples=150, deadline=None)
@given(drawn=batches())
def test_selection_equals_select(
    choosers: dict[tuple[int, int], ort.InferenceSession],
    drawn: tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """TopK in the graph keeps what ``select`` keeps, ties included, in every row of a padded batch."""
    forced, lengths, scores, keep = drawn
    size = scores.shape[1]
    positions = np.maximum(np.arange(size)[None] - (size - lengths[:, None]), -1)
    columns, counts = choosers[forced].run(None, {"scores": scores, "positions": positions, "keep": keep})
    assert columns.shape == counts.shape == (len(lengths), keep.max())
    for row, n in enumerate(lengths):
        wanted = select(scores[row, size - n :], int(keep[row, 0]), *forced) + size - n
        np.testing.assert_array_equal(columns[row][counts[row]], wanted)
        assert (np.diff(counts[row].astype(int)) >= 0).all()  # what does not count lies in front
        assert (
            len(set(columns[row].tolist())) == len(columns[row])
            and 0 <= columns[row].min() <= columns[row].max() < size
        )


@settings(max_examples=150, deadline=None)
@given(drawn=batches(), mass=st.floats(0.05, 0.999), seed=st.integers(0, 99))
def test_a_share_of_the_mass_equals_mass_count(
    choosers: dict[tuple[int, int], ort.InferenceSession],
    drawn: tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray],
    mass: float,
    seed: int,
) -> None:
    """A negative keep counts the tokens of its row itself; rows beside it may ask for a number."""
    forced, lengths, _, keep = drawn
    size = int(lengths[0])
    scores = np.random.default_rng(seed).normal(0, 4, (len(lengths), size)).astype(np.float32)
    share = round(mass * 1_000_000)
    wanted = [mass_count(scores[r, size - n :], share / 1e6, *forced, SCALE) for r, n in enumerate(lengths)]
    asked = np.where(np.arange(len(lengths))[:, None] % 2 == 0, -share, keep)
    positions = np.maximum(np.arange(size)[None] - (size - lengths[:, None]), -1)
    columns, counts = choosers[forced].run(None, {"scores": scores, "positions": positions, "keep": asked})
    for row, n in enumerate(lengths):
        count = wanted[row] if row % 2 == 0 else int(keep[row, 0])
        chosen = select(scores[row, size - n :], count, *forced) + size - n
        np.testing.assert_array_equal(columns[row][counts[row]], chosen)
