"""A tiny random model with a tokenizer of words, and rows of data for it: whole federations run in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 40


def save_model(folder: Path) -> Path:
    """A Llama of two layers that knows the words w0 to w37."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=WORDS - 1,
        eos_token_id=WORDS - 2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(WORDS - 2)} | {"</s>": WORDS - 2, "<unk>": WORDS - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def save_rows(path: Path, count: int = 48, groups: int = 4) -> Path:
    """Rows that count upwards: prompt "w3 w4", answer "w5 w6 w7 w8"."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words = [f"w{(number + step) % 30}" for step in range(6)]
            row = {"prompt": " ".join(words[:2]), "answer": " ".join(words[2:]), "group": f"g{number % groups}"}
            file.write(json.dumps(row) + "\n")
    return path
