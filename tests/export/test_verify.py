"""Verification finds what is wrong with a written graph, and says where it starts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")

import onnx
import onnx_ir as ir
import torch
from fstq_export import decoder, reference, rounding, segments, source, verify
from fstq_export.passes.pruning import PruneStage
from fstq_export.passes.scope import layer_of
from safetensors.numpy import load_file, save_file

from fstq_infer.errors import ExportError, UnsupportedModelError, VerificationError
from fstq_infer.fisher.probe import Probe
from fstq_infer.runtime.engine import Stage

from . import families

STAGES = (Stage(2, 1, 8),)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model, the folder of its graph, and the probes of its stages."""

    model: Path
    graph: Path
    probes: list[Probe]

    def verified(self, folder: Path | None = None, **options: Any) -> verify.Verification:
        return families.verified(self.model, folder or self.graph, STAGES, self.probes, **options)

    def copied(self, to: Path) -> Path:
        """A copy of the graph that a test may spoil."""
        shutil.copytree(self.graph, to)
        return to


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("llama")
    model = families.make("llama", folder / "model")
    return Exported(model, folder / "out", families.exported(model, folder / "out", STAGES))


def spoil(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change one stored weight: in place in model.onnx.data, or in model.onnx where it is small."""
    model = ir.load(folder / decoder.GRAPH)
    (value,) = [value for found, value in model.graph.initializers.items() if name in found]
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None:
        data = np.memmap(folder / decoder.WEIGHTS, np.float32, "r+", tensor.offset, tuple(tensor.shape.numpy()))
        change(data)
        data.flush()
    else:
        small = tensor.numpy().copy()
        change(small)
        value.const_value = ir.tensor(small, name=value.name)
        ir.save(model, folder / decoder.GRAPH)


def edit(folder: Path, change: Callable[[onnx.NodeProto], None]) -> None:
    """Change nodes of the stored graph; its weights stay where they are."""
    proto = onnx.load(folder / decoder.GRAPH, load_external_data=False)
    for node in proto.graph.node:
        change(node)
    onnx.save(proto, folder / decoder.GRAPH)


def nudge(data: np.ndarray) -> None:
    data[3, 5] += 0.5


def to_nan(data: np.ndarray) -> None:
    data.flat[7] = np.nan


def test_a_right_graph_passes(llama: Exported) -> None:
    result = llama.verified()
    assert result.tolerance == verify.TOLERANCE["float32"]
    assert len(result.by_layer) == families.LAYERS and 0 < max(result.by_layer) < 1e-4
    assert result.by_layer[-1] == result.dense
    written = result.to_json()
    assert json.loads(json.dumps(written)) == written
    assert written["dense"]["by_layer"] == list(result.by_layer)
    assert written["pruned"] == {"logits": result.pruned, "kept_equal": True}


def test_without_stages_nothing_is_said_about_pruning(llama: Exported, tmp_path: Path) -> None:
    families.exported(llama.model, tmp_path, ())
    result = families.verified(llama.model, tmp_path, (), [])
    assert result.pruned is None and result.kept_equal is None
    assert result.to_json()["pruned"] is None


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_wrong_weight_names_its_layer(llama: Exported, tmp_path: Path, layer: int) -> None:
    folder = llama.copied(tmp_path / "out")
    spoil(folder, f"layers.{layer}.mlp.up_proj", nudge)
    with pytest.raises(VerificationError, match=f"^LlamaForCausalLM: .* from decoder layer {layer} on"):
        llama.verified(folder)


def test_another_epsilon_names_its_layer(llama: Exported, tmp_path: Path) -> None:
    folder = llama.copied(tmp_path / "out")

    def change(node: onnx.NodeProto) -> None:
        if node.op_type == "RMSNormalization" and "layers.2/" in node.name:
            next(a for a in node.attribute if a.name == "epsilon").f = 0.3

    edit(folder, change)
    with pytest.raises(VerificationError, match="from decoder layer 2 on"):
        llama.verified(folder)


@pytest.mark.parametrize("name", ["lm_head", "model.norm.weight", "layers.3.mlp.down_proj"])
def test_a_wrong_end_is_refused(llama: Exported, tmp_path: Path, name: str) -> None:
    folder = llama.copied(tmp_path / "out")

    def change(data: np.ndarray) -> None:
        data.flat[11] += 0.5

    spoil(folder, name, change)
    with pytest.raises(VerificationError, match="last layer, final norm or head differ"):
        llama.verified(folder)


@pytest.mark.parametrize(
    ("name", "where"), [("layers.1.self_attn.v_proj", "decoder layer 1"), ("lm_head", "final norm or head")]
)
def test_weights_that_are_no_numbers_are_refused(llama: Exported, tmp_path: Path, name: str, where: str) -> None:
    folder = llama.copied(tmp_path / "out")
    spoil(folder, name, to_nan)
    with pytest.raises(VerificationError, match=where):
        llama.verified(folder)


def test_a_wrong_embedding_is_found_in_layer_0(llama: Exported, tmp_path: Path) -> None:
    folder = llama.copied(tmp_path / "out")

    def change(data: np.ndarray) -> None:
        data += 0.1

    spoil(folder, "embed_tokens", change)
    with pytest.raises(VerificationError, match="from decoder layer 0 on"):
        llama.verified(folder)


@pytest.mark.parametrize("part", ["key.matrix", "conv2.weight", "skip.weight"])
def test_a_wrong_probe_names_the_prune_layer(llama: Exported, tmp_path: Path, part: str) -> None:
    folder = llama.copied(tmp_path / "out")

    def change(data: np.ndarray) -> None:
        data[:] = data.ravel()[::-1].reshape(data.shape)

    spoil(folder, f"fstq.probe.1.{part}", change)
    with pytest.raises(VerificationError, match="keep different tokens at prune layer 2"):
        llama.verified(folder)


def test_a_probe_of_no_numbers_names_the_prune_layer(llama: Exported, tmp_path: Path) -> None:
    probe = families.random_probe(source.resolve(str(llama.model)).config, 8)
    with torch.no_grad():
        probe.skip.weight[0, 0, 0] = float("nan")
    resolved = source.resolve(str(llama.model))
    decoder.save(decoder.build_graph(resolved, "float32", [PruneStage(STAGES[0], probe.arrays())]), tmp_path)
    with pytest.raises(VerificationError, match="scores that are no numbers at prune layer 2"):
        families.verified(llama.model, tmp_path, STAGES, [probe])


def test_another_stage_than_the_graphs_is_refused(llama: Exported) -> None:
    with pytest.raises(VerificationError, match="prune layer 2"):
        families.verified(llama.model, llama.graph, [Stage(2, 5, 8)], llama.probes)


def test_a_wrong_number_behind_the_prune_layer_is_refused(llama: Exported, tmp_path: Path) -> None:
    folder = llama.copied(tmp_path / "out")
    proto = onnx.load(folder / decoder.GRAPH, load_external_data=False)
    late = [n for n in proto.graph.node if n.name.startswith("fstq/prune.1/Gather_")]
    assert len(late) == 2  # cos and sin of the tokens that stay
    late[0].input[0], late[1].input[0] = late[1].input[0], late[0].input[0]
    onnx.save(proto, folder / decoder.GRAPH)
    with pytest.raises(VerificationError, match=r"LlamaForCausalLM: .*(layer 2|prune layer)"):
        llama.verified(folder)


def test_a_missed_sliding_window_is_refused(tmp_path: Path) -> None:
    model = families.make("mistral", tmp_path / "model")
    resolved = source.resolve(str(model))
    resolved.config.sliding_window = None
    with reference.quiet():
        decoder.save(decoder.build_graph(resolved, "float32", []), tmp_path)
    with pytest.raises(VerificationError, match=r"MistralForCausalLM: .* decoder layer 0"):
        families.verified(model, tmp_path, (), [])


def test_small_numbers_are_measured_by_their_own_scale(tmp_path: Path) -> None:
    """A residual of size 0.02, as freshly made models have it: an error of a tenth is no rounding error."""
    model = families.make("llama", tmp_path / "model", scale=0.02)
    families.exported(model, tmp_path / "out", ())
    families.verified(model, tmp_path / "out", (), [])

    def change(data: np.ndarray) -> None:
        data += 0.05

    spoil(tmp_path / "out", "layers.1.mlp.down_proj", change)
    with pytest.raises(VerificationError, match="from decoder layer 1 on"):
        families.verified(model, tmp_path / "out", (), [])


def test_what_rounding_does_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights so large that attention is a choice between two tokens: some rows turn on the last bit."""
    monkeypatch.setitem(verify.TOLERANCE, "float32", 1e-4)
    model = families.make("llama", tmp_path / "model", scale=20.0)
    probes = families.exported(model, tmp_path / "out", STAGES)
    found = families.verified(model, tmp_path / "out", STAGES, probes)
    assert 1e-4 < max(*found.by_layer, found.dense) <= found.tolerance <= rounding.MOST

    def change(data: np.ndarray) -> None:
        data[:] = data[::-1].copy()

    spoil(tmp_path / "out", "layers.1.mlp.up_proj", change)
    with pytest.raises(VerificationError, match=r"decoder layer 1 on: .*; rounding alone moves the reference by"):
        families.verified(model, tmp_path / "out", STAGES, probes)


def test_rounding_is_measured_only_where_it_is_needed(llama: Exported) -> None:
    runs: list[int] = []
    with reference.reference(source.resolve(str(llama.model))) as frozen:

        def run() -> dict[str, np.ndarray]:
            runs.append(1)
            ids = torch.tensor([families.ids(20)])
            return {"logits": frozen.model(input_ids=ids, use_cache=False).logits.detach().numpy()}

        allowance = rounding.Allowance(frozen, 1e-3, run)
        assert allowance.of("logits", 9e-4) == 1e-3 and len(runs) == 1 and allowance.noise == {}
        assert allowance.of("logits", float("inf")) == allowance.of("logits", 0.5) == 1e-3
        assert len(runs) == 3 and 1e-7 < allowance.noise["logits"] < 1e-4 and allowance.advice("logits") == ""
        assert np.array_equal(run()["logits"], allowance.wanted["logits"])  # nothing stays of the nudges
        for noise, allowed in ((1e-3, 4e-3), (1.0, rounding.MOST)):
            allowance.noise["logits"] = noise
            assert allowance.of("logits", 2e-3) == pytest.approx(allowed)


def test_difference() -> None:
    wanted = np.random.default_rng(0).normal(0, 5, (3, 100))
    assert rounding.difference(wanted, wanted) == 0
    assert rounding.difference(wanted + 0.5, wanted) == pytest.approx(0.5 / wanted.std())
    assert rounding.difference(wanted * 1e-3 + 1e-3, wanted * 1e-3) == pytest.approx(1 / wanted.std())
    assert rounding.difference(np.where(wanted > 4, np.nan, wanted), wanted) == float("inf")
    assert rounding.difference(np.full((3, 100), np.inf), wanted) == float("inf")
    with pytest.raises(VerificationError, match=r"shape \(3, 99\), the reference \(3, 100\)"):
        rounding.difference(wanted[:, 1:], wanted)


def test_half_precision(llama: Exported, tmp_path: Path) -> None:
    probes = families.exported(llama.model, tmp_path, STAGES, "float16")
    result = families.verified(llama.model, tmp_path, STAGES, probes, "float16")
    assert 1e-4 < result.dense < result.tolerance == 3e-2


def test_empty_and_long_prompts(llama: Exported) -> None:
    result = llama.verified(prompts=[[], families.ids(300)])
    assert result.prompts == 3


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_segments_follow_the_layers(llama: Exported) -> None:
    graph = ir.load(llama.graph / decoder.GRAPH).graph
    found = segments.split(graph)
    assert [s.label for s in found] == ["embedding", "layer 0", "layer 1", "stage 1", "layer 2", "layer 3", "head"]
    assert sum(len(s.nodes) for s in found) == len(graph)
    assert [s.residual is not None for s in found] == [False, True, True, False, True, True, False]
    for segment in found[1:3]:
        assert {layer_of(node) for node in segment.nodes} == {int(segment.label[-1])}
    assert {"present.1.key", segment_residual(found, "layer 1")} <= {v.name for v in found[2].outputs}


def segment_residual(found: list[segments.Segment], label: str) -> str | None:
    return next(s.residual for s in found if s.label == label)


def test_segments_equal_the_whole_graph(llama: Exported, tmp_path: Path) -> None:
    tokens, positions = families.batch([families.ids(30, 1), families.ids(22, 2)])
    calls: list[dict[str, np.ndarray]] = [
        {"input_ids": tokens, "position_ids": positions, "keep": np.array([[15], [12]])},
        {"input_ids": np.array([[5], [6]]), "position_ids": np.array([[30], [22]]), "keep": np.array([[1], [1]])},
    ]
    whole = families.Runner(llama.graph / decoder.GRAPH, tmp_path)
    wanted = [whole(**call) for call in calls]
    pieces: list[dict[str, Any]] = [{}, {}]
    for _, results in segments.run(llama.graph, decoder.GRAPH, calls):
        for seen, result in zip(pieces, results, strict=True):
            seen.update(result)
    for seen, call in zip(pieces, wanted, strict=True):
        for name, value in call.items():
            np.testing.assert_allclose(seen[name], value, atol=1e-5, err_msg=name)
    assert not list(llama.graph.glob(".segment-*"))


def test_a_piece_that_cannot_run_is_named(llama: Exported, tmp_path: Path) -> None:
    folder = llama.copied(tmp_path / "out")

    def change(node: onnx.NodeProto) -> None:
        if "layers.1/" in node.name and node.op_type == "RMSNormalization":
            node.op_type = "NoSuchOperator"

    edit(folder, change)
    with pytest.raises(VerificationError, match=r"cannot run the written graph's layer 1: .*NoSuchOperator"):
        llama.verified(folder)


def test_a_stage_without_a_probe_goes_on_with_the_scores_before(llama: Exported, tmp_path: Path) -> None:
    resolved = source.resolve(str(llama.model))
    probe = families.random_probe(resolved.config, 8, seed=1)
    stages = (Stage(1, 1, 8), Stage(2, 1, 4), Stage(3, 1, 4))
    first = PruneStage(stages[0], probe.arrays(), probe.queries)
    carried = [first, PruneStage(stages[1], None), PruneStage(stages[2], None)]
    decoder.save(decoder.build_graph(resolved, "float32", carried), tmp_path)
    assert not any("fstq.probe.2" in name for name in ir.load(tmp_path / decoder.GRAPH).graph.initializers)
    result = families.verified(llama.model, tmp_path, stages, [probe, None, None])
    assert result.kept_equal and result.pruned is not None and result.pruned < 1e-4
    other = families.random_probe(resolved.config, 4, seed=2)
    with pytest.raises(VerificationError, match="keep different tokens at prune layer 2"):
        families.verified(llama.model, tmp_path, stages, [probe, other, None])
    with pytest.raises(UnsupportedModelError, match="the first pruning stage has no scores"):
        decoder.build_graph(resolved, "float32", carried[1:])


# --- the reference ---------------------------------------------------------------------------------------------------


def test_streamed_and_resident_references_agree(llama: Exported) -> None:
    resolved = source.resolve(str(llama.model))
    text = verify.Text.of([families.ids(20), families.ids(9)], np.array([families.ids(3), families.ids(3)]))
    with reference.reference(resolved, True) as streamed, torch.no_grad():
        one = text.forward(streamed)
    with reference.reference(resolved, False) as resident, torch.no_grad():
        np.testing.assert_allclose(one, text.forward(resident), atol=1e-6)


def test_a_checkpoint_without_all_weights_is_refused(llama: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    resolved = source.resolve(str(folder))
    with pytest.raises(ExportError, match=r"lacks 1 weights .*model.layers.1.mlp.up_proj.weight"):
        reference.reference(resolved).__enter__()
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .*weights that the checkpoint does not hold"):
        decoder.build_graph(resolved, "float32", [])


def test_broken_weights_are_refused(llama: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.model, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    resolved = source.resolve(str(folder))
    with pytest.raises(ExportError, match="the weights cannot be read"):
        reference.reference(resolved).__enter__()


def test_a_configuration_that_builds_no_model_is_refused(llama: Exported) -> None:
    config = source.resolve(str(llama.model)).config
    config.rope_parameters = {"rope_type": "no such type"}
    with pytest.raises(UnsupportedModelError, match="llama: Transformers cannot build"):
        reference.skeleton(config)


def test_a_full_disk_is_an_export_error(llama: Exported, tmp_path: Path) -> None:
    model = ir.load(llama.graph / decoder.GRAPH)
    with pytest.raises(ExportError, match="could not be written"):
        decoder.save(model, tmp_path / "no" / "such" / "folder")
