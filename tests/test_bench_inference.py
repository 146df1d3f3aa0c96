"""bench/inference.py: files for peers, worker processes, and what is said of measurements."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the 'export' extra")
pytest.importorskip("mobius", reason="needs the 'export' extra")
pytest.importorskip("onnxruntime", reason="needs the 'ort' extra")

from fstq_infer import Generator
from fstq_infer.bundle import Bundle
from fstq_infer.quant.plan import Plan

BENCH = Path(__file__).parents[1] / "bench"
MODULES = (
    *("inference", "inference_report", "case", "runs", "artefacts", "pool", "shapes", "worker", "contenders"),
    *("peers", "lineup", "common"),
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def state(shape: Any) -> dict[str, Any]:
    """A real model's tensors by name."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                tie_word_embeddings=True,
            )
        )
    return dict(model.state_dict())


@pytest.mark.parametrize("name", ["tiny", "0.5B", "1.5B"])
def test_shapes_list_the_models_matrices(bench: Any, name: str) -> None:
    shape = bench("shapes").SHAPES[name]
    found = {key.removesuffix(".weight"): tuple(t.shape) for key, t in state(shape).items() if t.ndim == 2}
    found.pop("lm_head")  # the embedding
    assert shape.matrices() == found


def test_a_shapes_plan_is_read_back_and_has_its_bits(bench: Any) -> None:
    artefacts, shape = bench("artefacts"), bench("shapes").SHAPES["0.5B"]
    bits = {  # of all weights
        name: Plan.from_toml(artefacts.plan_text(shape, *formats).encode()).bits
        for name, formats in artefacts.PLANS.items()
    }
    assert 8 < bits["w8"] < 8.1 and 4 < bits["w4"] < 4.3 and 7 < bits["w8h4"] < 8


def test_every_tensor_has_its_own_name_in_gguf(bench: Any) -> None:
    module, names = bench("gguf_qwen2"), state(bench("shapes").SHAPES["tiny"])
    found = [module.renamed(name) for name in names]
    assert len(set(found)) == len(names)
    assert {"token_embd.weight", "blk.3.attn_k.bias", "blk.0.ffn_down.weight", "output_norm.weight"} <= set(found)
    with pytest.raises(KeyError):
        module.renamed("model.layers.0.self_attn.q_norm.weight")


def test_other_models_are_not_converted(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="a peer's package")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="only qwen2"):
        bench("gguf_qwen2").convert(tmp_path, tmp_path / "out.gguf", "Q8_0")


def test_our_contender_says_what_the_runtime_says(bench: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    for keep in (1.0, 0.5):
        runner = bench("contenders").Fstq(tiny_bundle.path, 1, {"keep": keep})
        ids = bench("worker").prompt(runner.vocab, 40)
        tokens = [runner.prefill(ids, 6)]
        for _ in range(5):
            tokens.append(runner.step(tokens[-1]))
        expected = Generator.load(tiny_bundle.path, threads=1).generate(ids, keep=keep, max_tokens=6, temperature=0.0)
        assert list(expected.tokens) == tokens[: len(expected.tokens)]
        assert runner.kv_bytes() > 0


def test_a_contenders_last_id_is_read_like_a_generated_one(bench: Any, tiny_bundle: Bundle) -> None:
    runner = bench("contenders").Fstq(tiny_bundle.path, 1, {"keep": 1.0})
    ids = bench("worker").prompt(runner.vocab, 24)
    found = runner.after(ids)
    runner.prefill(ids, 1)
    np.testing.assert_allclose(found, runner.logits(), atol=1e-4)


def test_measuring_gives_seconds_that_add_up(bench: Any, tiny_bundle: Bundle) -> None:
    runner = bench("contenders").Fstq(tiny_bundle.path, 1, {"keep": 1.0})
    found = bench("worker").measure(runner, 30, 4)
    assert found["ttft_s"] > 0 and found["decode_s"] > 0 and found["kv_bytes"] > 0
    assert found["total_s"] == pytest.approx(found["ttft_s"] + found["decode_s"])
    assert bench("worker").memory()["peak_rss"] >= bench("worker").memory()["rss"] > 1 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_stream_measures_three_kinds(bench: Any, threads: int) -> None:
    found = bench("worker").Stream(threads, 1 << 16).measure()
    assert set(found) == {"copy_bytes_per_s", "triad_bytes_per_s", "read_bytes_per_s"} and min(found.values()) > 0


def test_a_worker_without_its_runtime_tells_how_to_install_it(bench: Any) -> None:
    if importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed here")
    with pytest.raises(bench("pool").Absent, match="pip install llama-cpp-python"):
        bench("pool").Worker(sys.executable, "llama.cpp", "-", 1, {})


def test_a_worker_that_cannot_load_says_why(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(bench("pool").Gone, match="BundleNotFoundError"):
        bench("pool").Worker(sys.executable, "fstq", str(tmp_path), 1, {"keep": 1.0})


def test_a_worker_that_dies_is_told_by_its_status(bench: Any, tiny_bundle: Bundle) -> None:
    worker = bench("pool").Worker(sys.executable, "fstq", str(tiny_bundle.path), 1, {"keep": 1.0})
    worker.process.kill()
    with pytest.raises(bench("pool").Gone, match="status -9"):
        worker.ask({"do": "measure", "prompt": 8, "new": 2})


def test_a_workers_mapped_weights_are_seen(bench: Any, tiny_bundle: Bundle) -> None:
    worker = bench("pool").Worker(sys.executable, "fstq", str(tiny_bundle.path), 1, {"keep": 1.0})
    seen = worker.mapped()
    worker.close()
    assert seen > 1 << 20 and worker.mapped() == 0


@pytest.mark.parametrize(("available", "mapped"), [(1 << 40, 0), (0, 0), (1 << 40, 1 << 40)])
def test_workers_come_in_waves_where_memory_is_short(
    bench: Any, tiny_bundle: Bundle, available: int, mapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, lineup, fits = bench("case"), bench("lineup"), available > mapped
    monkeypatch.setattr(module, "available_memory", lambda: available)
    monkeypatch.setattr(module.Worker, "mapped", lambda _: mapped)
    monkeypatch.setattr(module, "PAUSE", 0.0)
    maker = SimpleNamespace(name="tiny", path=lambda _artefact: tiny_bundle.path, peers=sys.executable)
    ours = (lineup.own("w8", 1.0), lineup.own("w4+8", 0.25), lineup.own("fp32", 1.0))
    absent = lineup.Contender("onnxruntime-genai int8", "onnxruntime-genai", (("-", {}),))
    case = module.Case(maker, bench("shapes").SHAPES["tiny"], 40, 3, 1, 2, (*ours, absent), {}, 1 << 16)
    found = case.measure()
    rows = {one["contender"]: one for one in found["rows"]}
    assert list(rows) == [ours[0].name, ours[1].name, ours[2].name, absent.name]
    assert "pip install onnxruntime-genai" in rows[absent.name]["skipped"]
    assert all(len(rows[one.name]["totals_s"]) == 2 and "logits" not in rows[one.name] for one in ours)
    assert rows[ours[0].name]["agreement"] == pytest.approx(1.0)
    assert rows[ours[1].name]["kv_bytes"] < rows[ours[0].name]["kv_bytes"]
    waves = [wave["contenders"] for wave in found["waves"]]
    assert waves[0][0] == ours[0].name and all("anchor_s" in wave for wave in found["waves"])
    assert waves == [[one.name for one in ours]] if fits else waves[1] == [ours[0].name, ours[2].name]


def test_bundles_that_cannot_be_made_are_rows(bench: Any, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle) -> None:
    module, lineup = bench("case"), bench("lineup")
    monkeypatch.setattr(module, "PAUSE", 0.0)

    def path(artefact: str) -> Path:
        if artefact.startswith("w4"):
            raise RuntimeError("export ended with 1")
        return tiny_bundle.path

    maker = SimpleNamespace(name="tiny", path=path, peers=sys.executable)
    chosen = (lineup.own("w8", 1.0), lineup.own("w4", 1.0))
    found = module.Case(maker, bench("shapes").SHAPES["tiny"], 20, 2, 1, 1, chosen, {}, 1 << 16).measure()
    assert found["rows"][1]["error"] == "export ended with 1" and found["rows"][0]["total_s"] > 0


def test_finished_measurements_are_known_by_their_settings(bench: Any, tmp_path: Path) -> None:
    runs, path = bench("runs"), tmp_path / "tiny-64.json"
    versions = runs.versions(sys.executable, sys.executable)
    assert versions["own"] == versions["peers"] and versions["own"]["numpy"] == np.__version__
    wanted = {"new": 8, "threads": 2, "rounds": 5, "versions": versions}
    assert not runs.finished(path, wanted, ["a"])
    path.write_text(json.dumps({**wanted, "rows": [{"contender": "a"}]}))
    assert runs.finished(path, wanted, ["a"]) and not runs.finished(path, wanted, ["a", "b"])
    for key in ("new", "threads", "rounds"):
        with pytest.raises(runs.Differs, match=rf"with {key} {wanted[key]}, not 3\. --again"):
            runs.finished(path, {**wanted, key: 3}, ["a"])
    other = {**versions, "peers": {**versions["peers"], "numpy": "0.1", "gguf": "9"}}
    with pytest.raises(runs.Differs, match=rf"numpy {np.__version__}, not 0\.1 \(peers\)"):
        runs.finished(path, {**wanted, "versions": other}, ["a"])
    path.write_text(json.dumps({"new": 8, "threads": 2, "rounds": 5, "rows": [{"contender": "a"}]}))
    assert runs.finished(path, {**wanted, "versions": other}, ["a"])  # of before versions were told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "tiny,huge"], "there is no shape 'huge'; there are tiny"),
        (["--prompts", "64,x"], "--prompts"),
        (["--rounds", "0"], "0 is below 1"),
        (["--only", "vllm"], "no contender begins with 'vllm'"),
        (["--only", "fstq"], "name another folder with --runs"),
        (["--peers", "no-such-python"], "no Python that runs"),
    ],
)
def test_wrong_arguments_end_before_anything_is_measured(
    bench: Any, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench("inference").main([*arguments, "--work", str(tmp_path / "work")])
    assert ended.value.code == 2 and words in capsys.readouterr().err and not any(tmp_path.iterdir())


def row(name: str, total: float, peer: bool, **other: Any) -> dict[str, Any]:
    shown = {"contender": name, "peer": peer, "ttft_s": total / 2, "decode_s": total / 2, "total_s": total}
    sizes = {
        "decode_ms": 10.0,
        "peak_rss": 10**9,
        "weights_bytes": 9 * 10**8,
        "read_bytes": 8 * 10**8,
        "kv_bytes": 10**8,
    }
    return shown | sizes | {"agreement": 0.999} | other


def run(shape: str, prompt: int, scale: float = 1.0) -> dict[str, Any]:
    rows = [
        row("fstq w8 dense", 2.0 * scale, False),
        row("fstq w8 keep 25 %", scale, False, kv_bytes=4 * 10**7),
        row("fstq fp32 dense", 5.0 * scale, False),
        row("transformers bf16", 4.0 * scale, True),
        row("llama.cpp Q8_0", 3.0 * scale, True, peak_rss=int(10**9 * scale)),
        {"contender": "onnxruntime-genai int4", "peer": True, "skipped": "no | package:\n pip install it"},
        {"contender": "mobius on onnxruntime", "peer": True, "error": "ended with status -9"},
    ]
    stream = {"copy_bytes_per_s": 5e10, "read_bytes_per_s": 9e10}
    return {"shape": shape, "prompt": prompt, "new": 64, "stream": stream, "rows": rows}


def test_the_table_keeps_every_contender(bench: Any) -> None:
    lines = bench("inference_report").table(run("0.5B", 1024)).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 7
    assert "**llama.cpp Q8_0**" in lines[6] and "1.50" in lines[2] and "| 100 %" in lines[2]
    assert "skipped: no / package: pip install it" in lines[7] and "failed: ended with status -9" in lines[8]


def test_targets_follow_from_rows(bench: Any) -> None:
    found = bench("inference_report").targets([run("0.5B", 1024), run("0.5B", 4096, 4.0)])
    values = {name: figure["value"] for name, figure in found.items()}
    name = "0.5B, prompt 1024: fstq"
    assert values[f"{name} w8 keep 25 % over our dense fp32, whole answer"] == 5.0
    assert values[f"{name} w8 keep 25 % over the fastest peer, whole answer"] == 3.0
    assert values[f"{name} w8 dense over the fastest peer, whole answer"] == 1.5
    assert values[f"{name} w8 dense over Hugging Face bf16, first token"] == 2.0
    assert values[f"{name} w8 dense, decode as a share of the bandwidth bound"] == 1.0
    assert values[f"{name} w8 dense, peak RSS over weights + KV"] == 1.0
    growth = values["0.5B: fstq w8 dense, growth of time from 1024 to 4096 over the least of all peers"]
    assert growth == pytest.approx(6 / 9, abs=1e-4)
    assert values["0.5B, prompt 4096: KV bytes that keep 25 % saves"] == 0.6
    assert bench("inference_report").targets([run("1.5B", 256)]) == {}


def test_a_report_replaces_its_part_of_the_page(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    module = bench("inference_report")
    monkeypatch.setattr(bench("common"), "RESULTS", tmp_path / "results")
    (tmp_path / "images").mkdir()
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    for case in (run("0.5B", 1024), run("tiny", 64)):
        (tmp_path / f"{case['shape']}.json").write_text(json.dumps(case))
    module.report(tmp_path, None)
    assert "old" in page.read_text() and not (tmp_path / "results").exists()
    for _ in range(2):
        module.report(tmp_path, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "tiny" not in text
    assert text.count(module.BEGIN) == text.count("### 0.5B, prompt 1024") == 1
    assert ElementTree.parse(tmp_path / "images" / "inference.svg").getroot().tag.endswith("svg")
    written = json.loads((tmp_path / "results" / "inference.json").read_text())
    assert len(written["rows"]) == 7 and written["targets"]


@pytest.mark.slow
def test_a_whole_run_of_a_tiny_shape(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--shape", "tiny", "--prompts", "40", "--new", "4", "--threads", "1", "--rounds", "2"]
    given += ["--work", str(tmp_path / "work"), "--runs", str(tmp_path / "runs")]
    given += ["--only", "fstq fp32,transformers fp32,mobius,llama.cpp Q8_0"]
    bench("inference").main(given)
    found = json.loads((tmp_path / "runs" / "tiny-40.json").read_text())
    rows = {one["contender"]: one for one in found["rows"]}
    assert len(rows) == 6 and len(found["stream"]) == 3
    for name in ("fstq fp32 dense", "transformers fp32", "mobius on onnxruntime"):
        assert rows[name]["agreement"] > 0.99999 and len(rows[name]["totals_s"]) == 2
    assert rows["fstq fp32 keep 25 %"]["kv_bytes"] < rows["fstq fp32 dense"]["kv_bytes"]
    if not importlib.util.find_spec("gguf"):
        assert "pip install gguf" in rows["llama.cpp Q8_0"]["skipped"]
    bench("inference").main(given)
    assert "is there already" in capsys.readouterr().out
