"""bench/plots.py: the README's pictures from a hand-made quality.json and a bundle's report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "plots.py"
TEXT = "{http://www.w3.org/2000/svg}text"


def run(bundle: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, bundle, "--quality", folder / "quality.json", "--out", folder / "images"]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def bundle(folder: Path, tokens: list[str]) -> Path:
    kept = [at % 3 == 0 for at in range(len(tokens))]
    example = {"tokens": tokens, "scores": [float(at) for at in range(len(tokens))], "kept": kept, "answer": "<blue>"}
    (folder / "report.json").write_text(json.dumps({"calibration": {"example": example}}), encoding="utf-8")
    return folder


def test_both_pictures(tmp_path: Path) -> None:
    rows = [
        {"model": model, "tokens": 240, "scorer": scorer, "keep": keep, "exact": 0.6, "low": 0.5, "high": 0.7}
        | {"dense": 0.9}
        for model in ("small", "large")
        for scorer in ("probe", "random", "window")
        for keep in (0.5, 0.25)
    ]
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    tokens = ["The", " wi", "nd\n", "", " 東京", " </text>", "\x00", *[" word"] * 40]
    done = run(bundle(tmp_path, tokens), tmp_path)
    assert done.returncode == 0, done.stderr
    quality = ElementTree.parse(tmp_path / "images" / "quality.svg").getroot()
    assert {"small, prompts of 240 tokens", "large, prompts of 240 tokens"} <= {*quality.itertext()}
    prompt = ElementTree.parse(tmp_path / "images" / "prompt.svg").getroot()
    shown = [(text.text, text.get("class")) for text in prompt.iter(TEXT)]
    assert shown[:7] == [
        ("The", None), ("wi", "s"), ("nd↵", "s"), ("·", None), ("東京", "s"), ("</text>", "s"), ("⟨U+0000⟩", None),
    ]  # fmt: skip
    assert shown[-1] == ("answer: <blue>", "a")
    width = float(str(prompt.get("viewBox")).split()[2])
    for text in prompt.iter(TEXT):
        assert float(text.get("x", "")) + float(text.get("textLength", "")) < width
    assert len({text.get("y") for text in prompt.iter(TEXT)}) == 5, "a break, 200 columns of words, the answer"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert "make demo" in run(tmp_path, tmp_path).stderr
    (tmp_path / "report.json").write_text('{"calibration": null}')
    done = run(tmp_path, tmp_path)
    assert done.returncode == 0 and "skipped quality.svg" in done.stdout and "skipped prompt.svg" in done.stdout
