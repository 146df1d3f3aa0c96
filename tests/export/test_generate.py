"""Every family all the way: export, build, generate; greedy tokens equal Transformers' at keep 1, pruning prunes."""

from __future__ import annotations

from pathlib import Path

import pytest

from .families import FAMILIES, ids, make  # isort: skip - skips with a reason where the export extra is missing

import torch
from fstq_export.pipeline import Request, export
from fstq_export.recipe import Recipe
from transformers import AutoModelForCausalLM

from fstq_infer import Generator


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_export_build_generate(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    model = make(family, tmp_path / "model")
    export(Request(str(model), tmp_path / "b", Recipe(prune_layer=2, keep=0.5)))
    generator = Generator.load(tmp_path / "b")
    prompt = ids(60)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 60, dtype=torch.long), max_new_tokens=12, do_sample=False
    )[0, 60:].tolist()
    assert list(generator.generate(prompt, keep=1.0, max_tokens=12).tokens) == wanted
    pruned = generator.generate(prompt, max_tokens=12)
    assert len(pruned.kept) == 30 and pruned.kept[-16:] == tuple(range(44, 60))
