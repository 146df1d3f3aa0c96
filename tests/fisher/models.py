"""Tiny random causal LMs for tests: weights large enough that attention is far from uniform."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("transformers", reason="transformers is not installed; it comes with the 'export' extra")

import torch
import transformers

VOCABULARY, WIDTH, LAYERS, HEADS = 60, 32, 4, 4
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SHARED,
    "Qwen2": SHARED,
    "Gemma2": SHARED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Phi3": SHARED | {"partial_rotary_factor": 0.5},
    "GPT2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 96,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
OWN_ATTENTION: dict[str, dict[str, Any]] = {  # not by Transformers' attention interface
    "GPTNeo": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], LAYERS // 2]],
        "window_size": 8,
        "max_position_embeddings": 96,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}


def tiny(family: str = "Llama", seed: int = 0, **changes: Any) -> Any:
    """A model of one family, in eval mode, with eager attention; its weights require no gradient."""
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**(FAMILIES | OWN_ATTENTION)[family] | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return getattr(transformers, head)(config).eval().requires_grad_(False)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Random ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())
