"""The whole export on tiny models: bundles with and without calibration, refusals, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")

from fstq_export.contract import (
    Outcome,
    bound,
    candidate_layers,
    drop,
    interval,
    relative_cost,
    smallest_allowed,
    split,
)
from fstq_export.pipeline import Request, export
from fstq_export.recipe import Recipe
from fstq_export.wanted import Precision

from fstq_infer import Generator
from fstq_infer.bundle import Bundle
from fstq_infer.errors import (
    BundleExistsError,
    CalibrationDataError,
    ExportError,
    FstqError,
    OptionError,
    UnsupportedModelError,
)
from fstq_infer.fisher.items import Item
from tests.export.families import make


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training of probes has tests of its own; here it only has to happen."""
    monkeypatch.setattr("fstq_export.calibrate.EPOCHS", 2)
    monkeypatch.setattr("fstq_export.calibrate.STEPS", 6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "over", "old", "hills"]
    path = tmp_path_factory.mktemp("calib") / "items.jsonl"
    rows = [
        {"prompt": " ".join(rng.choices(words, k=rng.randint(12, 30))), "answer": " ".join(rng.choices(words, k=2))}
        for _ in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_without_calibration_the_bundle_is_dense_and_says_so(llama: Path, tmp_path: Path) -> None:
    done = export(Request(str(llama), tmp_path / "b"))
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.stages == ()
    assert bundle.manifest.pruning.keep == 1.0 and not bundle.manifest.pruning.calibrated
    assert done.report["calibration"] is None
    assert "nothing is known" in (tmp_path / "b" / "report.html").read_text().lower()
    assert bundle.manifest.provenance.libraries["torch"] != "unknown"
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_an_explicit_layer_prunes_without_calibration(llama: Path, tmp_path: Path) -> None:
    done = export(Request(str(llama), tmp_path / "b", Recipe(prune_layer=2, keep=0.25)))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert [s.layer for s in manifest.stages] == [2]
    assert manifest.pruning.keep == 0.25
    assert done.report["verification"]["pruned"]["kept_equal"]


def test_calibrated_export_measures_the_contract_and_baselines(llama: Path, calib: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    done = export(
        Request(str(llama), tmp_path / "b", Recipe(prune_layer=1, keep=0.5), calib),
        lambda name, n, of: seen.__setitem__(name, (n, of)),
    )
    calibration = done.report["calibration"]
    assert {"random", "recency", "last-token", "window", "probe"} <= calibration["curves"].keys()
    assert calibration["items"] + calibration["held_out"] == 40
    assert calibration["chosen"]["interval"][0] <= calibration["chosen"]["drop"] <= calibration["chosen"]["interval"][1]
    assert all(n == of for n, of in seen.values()), "every step reported its end"
    assert len(calibration["example"]["tokens"]) == len(calibration["example"]["kept"])
    contract = Bundle.open(tmp_path / "b").manifest.pruning.contract
    assert contract is not None and contract.met == (contract.drop <= contract.max_drop)


def test_two_stages_are_calibrated_one_after_the_other(
    llama: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a probe of its own, trained on what the one before leaves; quality is measured with all of them."""
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    recipe = Recipe(prune_layer=(1, 3), keep=(0.6, 0.4), max_quality_drop=0.9)
    done = export(Request(str(llama), tmp_path / "b", recipe, calib))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert [s.layer for s in manifest.stages] == [1, 3] and manifest.pruning.keep == (0.6, 0.4)
    assert done.report["verification"]["pruned"]["kept_equal"]
    calibration = done.report["calibration"]
    chosen = calibration["chosen"]
    assert (chosen["layers"], chosen["keeps"], chosen["keep"]) == ((1, 3), (0.6, 0.4), 0.4)
    both = [row for row in calibration["candidates"] if row["layers"] == (1, 3)]
    names = {row["probe"] for row in both}
    assert "scores carried on from layer 1" in names and any(name.startswith("distilled") for name in names)
    assert all(row["keeps"][0] == pytest.approx(row["keep"] ** 0.5) for row in both if row["keep"] in (0.5, 0.25))
    cost = next(row for row in both if row["keeps"] == (0.6, 0.4) and row["probe"] == calibration["probes"][-1])
    assert cost["relative_cost"] == pytest.approx((1 + 2 * 0.6 + 0.4) / 4)
    page = (tmp_path / "b" / "report.html").read_text()
    assert "60 % of the prompt from layer 1 on and 40 % from layer 3 on" in page.replace("\u00a0", " ")

    generator = Generator.load(tmp_path / "b")
    prompt = list(range(3, 103))
    assert len(generator.generate(prompt, max_tokens=2).kept) == 40
    assert len(generator.generate(prompt, keep=0.25, max_tokens=2).kept) == 25
    assert len(generator.generate(prompt, keep=(0.5, 0.3), max_tokens=2).kept) == 30
    if generator.defaults.auto is not None:
        assert len(generator.generate(prompt, keep="auto", max_tokens=2).kept) <= 100
    dense = generator.generate(prompt, keep=1.0, max_tokens=2)
    assert len(dense.kept) == 100


def test_mixed_precision_from_plan_to_text(llama: Path, calib: Path, tmp_path: Path, engine_cache: Path) -> None:
    """Calibrate, allocate, quantize, verify, commit, build an engine and generate; then follow the plan once more."""
    from fstq_infer.quant.plan import Plan
    from fstq_infer.runtime.generate import Generator

    recipe = Recipe(prune_layer=1, keep=0.5)
    wanted = Precision.parse("auto", 6.0, None, tune=8)
    done = export(Request(str(llama), tmp_path / "b", recipe, calib, precision=wanted))
    bundle = Bundle.open(tmp_path / "b")
    plan = Plan.from_toml(bundle.file("plan.toml").read_bytes())
    assert plan.bits <= 6.0 and len(set(plan.formats.values())) > 1
    assert done.report["verification"]["dense"]["logits"] < 1e-3
    assert done.report["verification"]["pruned"]["kept_equal"]
    assert done.report["precision"]["plan"]["bytes"] == plan.bytes
    formats = done.report["calibration"]["formats"]  # what they lose without pruning, beside the unquantized model
    assert formats["nll"] != done.report["calibration"]["dense"]["nll"] and formats["keep"] == 1.0
    probe = 4 * 60_000  # bytes, which stays as it is
    assert plan.bytes < bundle.manifest.files["model.onnx.data"].bytes < plan.bytes + probe
    assert "Bits per weight" in (tmp_path / "b" / "report.html").read_text()
    result = Generator.load(tmp_path / "b", threads=1).generate("the cat sat on a mat", max_tokens=4)
    assert len(result.tokens) >= 1
    again = Precision.parse(str(tmp_path / "b" / "plan.toml"), None, None)
    export(Request(str(llama), tmp_path / "c", precision=again))
    assert Plan.from_toml((tmp_path / "c" / "plan.toml").read_bytes()).formats == plan.formats


def test_the_same_seed_gives_the_same_probe(llama: Path, calib: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        export(Request(str(llama), tmp_path / name, Recipe(prune_layer=1, keep=0.5, seed=3), calib))
        files.append(Bundle.open(tmp_path / name).manifest.files["model.onnx.data"].sha256)
    assert files[0] == files[1]


def test_an_impossible_contract_exports_dense(
    llama: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fstq_export.heldout.drop", lambda *_: 0.5)
    done = export(Request(str(llama), tmp_path / "b", Recipe(max_quality_drop=0.01), calib))
    assert Bundle.open(tmp_path / "b").manifest.stages == ()
    assert not done.report["calibration"]["met"]


def test_plain_text_calibration(llama: Path, calib: Path, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("\n".join(json.loads(line)["prompt"] for line in calib.read_text().splitlines()))
    done = export(Request(str(llama), tmp_path / "b", Recipe(prune_layer=2, keep=0.5), text))
    assert done.report["calibration"]["dense"]["exact"] == 1.0  # the label is the model's own greedy continuation


def test_options_and_data_errors(llama: Path, calib: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(calib.read_text().splitlines()[:5]))
    cases: list[tuple[type[FstqError], str, Request]] = [
        (OptionError, "1 to 3", Request(str(llama), tmp_path / "b", Recipe(prune_layer=9))),
        (OptionError, "1 to 3", Request(str(llama), tmp_path / "b", Recipe(prune_layer=9), calib)),
        (OptionError, "--calib", Request(str(llama), tmp_path / "b", Recipe(keep=0.5))),
        (CalibrationDataError, "at least 24", Request(str(llama), tmp_path / "b", Recipe(), few)),
        (CalibrationDataError, "does not exist", Request(str(llama), tmp_path / "b", Recipe(), tmp_path / "no.jsonl")),
        (CalibrationDataError, "at least 24", Request(str(llama), tmp_path / "b", Recipe(), calib, max_prompt=2)),
        (ExportError, "does not exist", Request(str(tmp_path / "nothing-here"), tmp_path / "b")),
    ]
    for kind, words, request in cases:
        with pytest.raises(kind, match=words):
            export(request)
    assert not (tmp_path / "b").exists()
    with pytest.raises(OptionError, match="float16 graph"):
        Request("m", tmp_path / "b", dtype="float16", precision=Precision("fp32"))
    with pytest.raises(OptionError, match="float32"):
        Request("m", tmp_path / "b", dtype="int3")


def test_existing_output_is_refused_before_any_work_and_replaced_by_force(llama: Path, tmp_path: Path) -> None:
    export(Request(str(llama), tmp_path / "b"))
    with pytest.raises(BundleExistsError, match="--force"):
        export(Request("missing-model", tmp_path / "b"))
    before = Bundle.open(tmp_path / "b").manifest_sha256
    export(Request(str(llama), tmp_path / "b", Recipe(prune_layer=1), overwrite=True))
    assert Bundle.open(tmp_path / "b").manifest_sha256 != before


def test_unsupported_models_are_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "m")
    with pytest.raises((UnsupportedModelError, ExportError), match=r"(?i)bert"):
        export(Request(str(tmp_path / "m"), tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_nothing_half_is_left(llama: Path, tmp_path: Path, how: signal.Signals) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fstq_export import pipeline, decoder\n"
        "save = decoder.save\n"
        "def slow(model, folder):\n    save(model, folder)\n"
        "    Path(sys.argv[2] + '.ready').touch()\n    time.sleep(60)\n"
        "decoder.save = slow\n"
        "pipeline.export(pipeline.Request(sys.argv[1], Path(sys.argv[2])))\n"
    )
    out = tmp_path / "b"
    process = subprocess.Popen([sys.executable, "-c", code, str(llama), str(out)], stderr=subprocess.DEVNULL)
    ready = Path(f"{out}.ready")
    deadline = time.monotonic() + 90
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ready.exists()
    os.kill(process.pid, how)
    process.wait(30)
    ready.unlink()
    assert not out.exists()
    if how == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    export(Request(str(llama), out))
    assert list(tmp_path.iterdir()) == [out], "the next export clears what a kill left behind"


def test_policy_pieces() -> None:
    import numpy as np

    assert candidate_layers(2) == [1] and candidate_layers(24) == [6, 8, 12]
    ladder = {keep: (lost, lost + 0.002) for keep, lost in ((0.75, 0.03), (0.5, 0.0), (0.25, 0.1))}
    assert smallest_allowed(ladder, 0.02) == 0.5  # an unlucky 0.75 does not end the search
    lucky = {keep: (lost, lost + 0.002) for keep, lost in ((0.5, 0.05), (0.25, 0.0), (0.125, 0.2))}
    assert smallest_allowed(lucky, 0.01) is None  # nor does a lucky 0.25 decide it
    assert smallest_allowed({0.5: (0.0, 0.016)}, 0.01) is None and smallest_allowed({0.5: (0.0, 0.014)}, 0.01) == 0.5
    assert relative_cost((6,), 24, (0.25,)) == pytest.approx(0.4375)
    assert relative_cost((4, 8), 24, (0.5, 0.25)) == pytest.approx((4 + 2 + 4) / 24)
    dense, pruned = Outcome(np.ones(10), np.full(10, 0.5)), Outcome(np.array([1.0] * 9 + [0.0]), np.full(10, 0.6))
    assert drop(dense, pruned, "exact match") == pytest.approx(0.1)
    assert drop(dense, pruned, "nll") == pytest.approx(0.2)
    low, high = interval(dense, pruned, "exact match", 0)
    assert low <= 0.1 <= high and low < high
    assert bound(dense, pruned, "exact match", 0) == pytest.approx(0.3942, abs=1e-4)  # Clopper-Pearson, 1 of 10
    assert bound(dense, dense, "exact match", 0) == pytest.approx(1 - 0.05**0.1)  # none of 10: about the rule of three
    assert bound(dense, pruned, "nll", 0) == pytest.approx(0.2)
    items = [Item((i,), (i,)) for i in range(100)]
    training, held = split(items, 1)
    assert (
        len(held) == 25 and not set(training) & set(held) and sorted(training + held, key=lambda i: i.prompt) == items
    )
