"""Random checkpoints of known shapes, with a minimal tokenizer: shape decides speed and memory.

python bench/shapes.py NAME FOLDER      writes one; in a process of its own, so that its memory is nobody else's
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


def checkpoint(folder: Path, shape: str = "0.5B") -> None:
    """A bfloat16 Qwen2.5 of that shape, embedding and head tied."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        dtype=torch.bfloat16,
        **SHAPES[shape],
    )
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    core = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


if __name__ == "__main__":
    checkpoint(Path(sys.argv[2]), sys.argv[1])
