"""jetson/benchmark.py: golden outputs of recorded devices, a real run on a CPU, wrong input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fstq_infer import device
from fstq_infer.bundle import Bundle
from fstq_infer.doctor.facts import gather
from fstq_infer.errors import OptionError
from tests.jetson.scripts import GOLDEN, JETSONS, ROOT, environment, recorded_result, script

REMAKE = "if the change is meant, run tests/golden/jetson/make.py and read the difference"


@pytest.mark.parametrize("name", [*JETSONS, "laptop"])
def test_golden(name: str) -> None:
    content = recorded_result(name)
    assert json.dumps(content, indent=1) + "\n" == (GOLDEN / f"benchmark-{name}.json").read_text(), REMAKE
    assert script("report").markdown(content) == (GOLDEN / f"benchmark-{name}.md").read_text(), REMAKE


def test_speed_up_is_over_keep_1_or_not_known() -> None:
    content = recorded_result("laptop", prompts=(512,))
    dense, pruned = content["rows"]
    report, share = script("report"), f"{dense['total_s'] / pruned['total_s']:.2f}x"
    assert f"| {share} |" in report.markdown(content | {"rows": [pruned, dense]})
    assert f"| {pruned['total_s']:.3f} | - |" in report.markdown(content | {"rows": [pruned]})


def test_pruning_saves_what_the_clock_says() -> None:
    dense, pruned = recorded_result("orin-nano", prompts=(512,))["rows"]
    assert (dense["kept"], pruned["kept"]) == (512, 128)
    assert dense["prefill_s"] == pytest.approx(8e-3 + 1e-4 * 512)
    assert pruned["prefill_s"] == pytest.approx(8e-3 + 1e-4 * (512 + 3 * 128) / 4)
    energy = dense["power"]["prefill"]["joules_per_token"] / pruned["power"]["prefill"]["joules_per_token"]
    assert energy == pytest.approx(
        dense["prefill_s"] / pruned["prefill_s"], rel=0.05
    )  # watts are nearly constant there


def test_too_few_samples_claim_nothing() -> None:
    content = recorded_result("thor", prompts=(128,), power_seconds=0.05)
    assert content["rows"][0]["power"]["decode"] is None
    assert any("raise --power-seconds" in note for note in content["notes"])
    assert "| - | - |" in script("report").markdown(content)


@pytest.mark.parametrize(
    "wrong", [{"prompts": (4096,)}, {"new_tokens": 1}, {"repeats": 0}, {"keeps": ()}, {"keeps": (2.0,)}]
)
def test_wrong_plans(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        recorded_result("laptop", **wrong)


def test_roofline_follows_the_power_mode() -> None:
    benchmark = script("benchmark")
    assert benchmark.profile_for(gather(environment("orin-nano")), None).mode.name == "15W"
    assert benchmark.profile_for(gather(environment("laptop")), None) is None
    assert benchmark.profile_for(gather(environment("orin-nano")), "thor").mode == device.find("thor").mode


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert script("report").plot(recorded_result("orin-nano"), tmp_path)
    text = (tmp_path / "benchmark.svg").read_text()
    assert "<svg" in text


def test_a_real_run_on_this_cpu(tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = (
        "--prompts",
        "32,64,4096",
        "--new-tokens",
        "4",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--device",
        "orin-nano",
    )
    command = [sys.executable, str(ROOT / "jetson" / "benchmark.py"), str(tiny_bundle.path), *options]
    environment = {**os.environ, "FSTQ_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [(row["prompt"], row["keep"]) for row in content["rows"]] == [(32, 1.0), (32, 0.5), (64, 1.0), (64, 0.5)]
    assert all(row["ttft_s"] > 0 and row["roofline"]["ttft_s"] > 0 for row in content["rows"])
    assert content["notes"] == ["prompts above 156 tokens do not fit the context"]
    if content["device"]["jetson"] is None:
        assert "no power was measured" in done.stdout and "no Jetson" in done.stderr
        assert all(row["power"] is None for row in content["rows"])
    assert (tmp_path / "out" / "benchmark.svg").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "nowhere"),
        (("{b}", "--prompts", "many"), "numbers with commas"),
        (("{b}", "--prompts", "9999"), "prompt that fits"),
        (("{b}", "--device", "orin"), "did you mean"),
        (("{b}", "--backend", "none"), "no backend"),
    ],
)
def test_errors_are_one_line(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path_factory.getbasetemp() / "benchmark-cache"))  # one engine for all
    with pytest.raises(SystemExit, match=words) as caught:
        script("benchmark").main([*(a.format(b=tiny_bundle.path) for a in arguments), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith("error: ")
