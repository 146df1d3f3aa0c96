"""A Qwen2 checkpoint as a GGUF file for llama.cpp, without a vocabulary: prompts are ids. Needs numpy, torch, gguf.

python bench/gguf_qwen2.py MODEL OUT.gguf Q8_0|Q4_0|F16

Every matrix gets the type, the one that is embedding and head too; norms and biases stay float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def renamed(name: str) -> str:
    """Hugging Face's name of a tensor in llama.cpp's words; raises KeyError for one that Qwen2 does not have."""
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{int(layer)}.{PARTS[part]}.{kind}"


def convert(model: Path, out: Path, kind: str) -> None:
    """Write ``out``; raises ValueError for a model that is no Qwen2."""
    import gguf
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen2":
        raise ValueError(f"{model} is of the type {config['model_type']!r}; only qwen2 can be converted")
    quant = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(out, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    with safe_open(model / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            array = tensors.get_tensor(name).float().numpy()
            if array.ndim == 1:
                writer.add_tensor(renamed(name), np.ascontiguousarray(array))
            else:
                writer.add_tensor(renamed(name), gguf.quantize(array, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
