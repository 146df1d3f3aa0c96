"""Adapters made by PEFT itself for the tiny models of families.py, and what Transformers and PEFT compute with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .families import make  # isort: skip - skips with a reason where the export extra is missing

pytest.importorskip("peft", reason="peft is not installed; it comes with the 'dev' extra")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def adapter(model: Path, folder: Path, seed: int = 0, gain: float = 1.0, **settings: Any) -> Path:
    """A random adapter for a model, saved by PEFT; of rank 4 on all linear layers where ``settings`` say nothing."""
    torch.manual_seed(seed)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **chosen))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight *= gain
    made.save_pretrained(folder)
    return folder


def with_adapter(model: Path, folder: Path | None) -> Any:
    """The model as Transformers and PEFT run it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return (base if folder is None else PeftModel.from_pretrained(base, str(folder))).eval()


def logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """(vocab,) after the last token."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(ids)])).logits[0, -1].float().numpy())


def greedy(model: Any, ids: Sequence[int], tokens: int) -> list[int]:
    """Tokens that follow, greedily."""
    given = torch.tensor([list(ids)])
    mask = torch.ones_like(given)
    out = model.generate(input_ids=given, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return [int(token) for token in out[0, len(ids) :]]


def family(name: str, folder: Path, **changes: Any) -> Path:
    """A tiny model."""
    return make(name, folder, **changes)
