"""Real pretrained models and data, read where they lie (FSTQ_SHARED, or ../shared beside the repository)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")
pytest.importorskip("onnxruntime", reason="engines need the 'ort' extra")

from fstq_export import data
from fstq_export.pipeline import Request, export
from fstq_export.recipe import Recipe

from fstq_infer import Generator

SHARED = Path(os.environ.get("FSTQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"no models under {SHARED}; set FSTQ_SHARED"),
]
PROMPTS = ("Once upon a time", "Lily and Tom went to the park. They saw a big", "One day, a little dog")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))


def test_stories_greedy_equals_transformers_token_by_token(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = SHARED / "models" / "stories260k"
    export(Request(str(model), tmp_path / "b", Recipe(prune_layer=2, keep=0.5)))
    generator = Generator.load(tmp_path / "b")
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        wanted = reference.generate(**ids, max_new_tokens=120, do_sample=False)[0, ids.input_ids.shape[1] :].tolist()
        result = generator.generate(prompt, keep=1.0, max_tokens=120)
        assert list(result.tokens) == wanted
        assert result.text == tokenizer.decode(wanted, skip_special_tokens=True)
    together = generator.generate(list(PROMPTS), keep=1.0, max_tokens=30)
    alone = [generator.generate(prompt, keep=1.0, max_tokens=30) for prompt in PROMPTS]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


@pytest.mark.slow
def test_recall_keeps_its_answers_at_half_the_prompt(tmp_path: Path) -> None:
    items = SHARED / "data" / "recall"
    recipe = Recipe(prune_layer=2, keep=0.5)
    done = export(Request(str(SHARED / "models" / "stories260k-recall"), tmp_path / "b", recipe, items / "calib.jsonl"))
    generator = Generator.load(tmp_path / "b")
    exact = {1.0: 0, 0.5: 0}
    for example in data.read(items / "val.jsonl"):
        for keep in exact:
            result = generator.generate(example.prompt, keep=keep, max_tokens=16)
            exact[keep] += result.text.strip().startswith(str(example.answer))
    assert exact[1.0] >= 270  # of 300
    assert exact[0.5] >= 0.9 * exact[1.0]
    recency = next(row for row in done.report["calibration"]["curves"]["recency"] if row["keep"] == 0.5)
    assert recency["exact"] < 0.5
