"""fstq_export.timing: every operator of a real graph counts once, in its part; and what is not measured says why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")

from fstq_export import timing
from fstq_export.pipeline import Request, export
from fstq_export.recipe import Recipe

from fstq_infer.bundle import Bundle
from fstq_infer.runtime.ort import MODEL
from tests.export.families import make

PARTS = ["embedding", "layers before", "probe and selection", "layers after", "head"]


def test_a_pruned_prefill_is_split_into_its_parts(tiny_bundle: Bundle) -> None:
    stages = tiny_bundle.manifest.stages
    prompts = [range(5), range(64), range(90)]
    found = timing.measure(tiny_bundle.path, MODEL, 40_000, stages, 0.25, prompts, 96, 160)
    assert (found["tokens"], found["kept"], found["random"], found["keep"]) == (64, 16, False, 0.25)
    assert list(found["pruned_ms"]) == PARTS and all(spent > 0 for spent in found["pruned_ms"].values())
    assert list(found["dense_ms"]) == [part for part in PARTS if part != "probe and selection"]
    assert found["dense_probe_ms"] > 0
    assert not list(tiny_bundle.path.glob("*.json.*")), "the profile went elsewhere"


def test_without_prompts_random_tokens_are_read_and_keeping_all_is_dense(tiny_bundle: Bundle) -> None:
    found = timing.measure(tiny_bundle.path, MODEL, 40_000, tiny_bundle.manifest.stages, 1.0, [], 96, 160)
    assert (found["tokens"], found["kept"], found["random"], found["pruned_ms"]) == (160, 160, True, None)


def test_sums_take_each_operators_fastest_run_after_the_first() -> None:
    parts = {"a/MatMul": "layers", "b/Add": "head"}

    def run(first: float, second: float) -> list[dict[str, object]]:
        names = (("a/MatMul", first), ("a/MatMul/Fused/", 100), ("Gelu", 10), ("b/Add", second))
        nodes = [{"cat": "Node", "name": f"{name}_kernel_time", "dur": spent} for name, spent in names]
        return [*nodes, {"cat": "Session", "name": "model_run", "dur": 0}]

    dense, pruned = [(1, 1), (700, 30), (800, 20)], [(1, 1), (50, 5), (40, 6)]
    events = [event for pair in zip(dense, pruned, strict=True) for times in pair for event in run(*times)]
    found = timing._by_part(events, parts, 2)
    assert found == [{"layers": 0.81, "head": 0.02}, {"layers": 0.15, "head": 0.005}]


def test_large_models_and_graphs_that_do_not_run_are_skipped_with_a_reason(tmp_path: Path) -> None:
    found = timing.measure(tmp_path, MODEL, timing.LARGEST + 1, (), 1.0, [], 96, 160)
    assert list(found) == ["skipped"] and "fstq bench" in found["skipped"]
    (tmp_path / MODEL).write_bytes(np.arange(64, dtype=np.uint8).tobytes())
    found = timing.measure(tmp_path, MODEL, 40_000, (), 1.0, [], 96, 160)
    assert list(found) == ["skipped"] and "could not run the graph" in found["skipped"]


def test_an_export_measures_what_it_wrote(tmp_path: Path) -> None:
    model = str(make("gpt2", tmp_path / "model"))
    dense = export(Request(model, tmp_path / "dense")).report
    assert list(dense["timing"]["dense_ms"]) == ["embedding", "layers", "head"]
    assert dense["timing"]["pruned_ms"] is None and dense["timing"]["dense_probe_ms"] is None
    pruned = export(Request(model, tmp_path / "pruned", Recipe(prune_layer=2, keep=0.5))).report
    assert list(pruned["timing"]["pruned_ms"]) == PARTS and pruned["timing"]["keep"] == 0.5
    assert pruned["resources"]["steps"]["measure times"] > 0
    assert json.loads((tmp_path / "pruned" / "report.json").read_text())["timing"] == pruned["timing"]
