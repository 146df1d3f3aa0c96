"""Shapes of real models with random weights (shape decides speed), written as bfloat16 Hugging Face checkpoints.

python bench/shapes.py SHAPE FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 decoder whose head is its embedding."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 151936
    positions: int = 32768

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def prune_layer(self) -> int:
        """A quarter of the way up."""
        return max(1, self.layers // 4)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every matrix, by its module's name."""
        kv = self.kv_heads * self.head_width
        parts = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        layers = {f"model.layers.{n}.{name}": size for n in range(self.layers) for name, size in parts.items()}
        return {"model.embed_tokens": (self.vocab, self.hidden), **layers}

    def kv_bytes(self, tokens: int, number: int) -> int:
        """Keys and values of so many tokens, ``number`` bytes each."""
        return 2 * self.layers * self.kv_heads * self.head_width * tokens * number


SHAPES = {
    "tiny": Shape(128, 256, 4, 2, 1, vocab=512, positions=8192),
    "0.5B": Shape(896, 4864, 24, 14, 2),
    "1.5B": Shape(1536, 8960, 28, 12, 2),
}


def checkpoint(shape: Shape, folder: Path) -> None:
    """Weights of one seed, and a minimal tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=0,
        eos_token_id=1,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="a", eos_token="b").save_pretrained(folder)


if __name__ == "__main__":
    checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))
