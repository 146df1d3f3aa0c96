"""Tiny random-weight models of many families, and what it takes to export and run one: no checkpoint, no network.

Four layers of width 64. Every weight is drawn anew from a fixed seed, norms and biases too, with a scale that makes
attention far from uniform and logits far from flat: a wrong mask, scale, norm or bias then shows in the first digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("transformers", reason="transformers is not installed; it comes with the 'export' extra")
pytest.importorskip("accelerate", reason="accelerate is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it comes with the 'export' extra")

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from fstq_export import decoder, reference, source, verify
from fstq_export.passes.pruning import PruneStage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fstq_infer.fisher.probe import Probe
from fstq_infer.runtime.engine import Stage

VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS, WINDOW = 512, 64, 4, 4, 256, 32
ENDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, Any] = ENDS | {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
COMMON = PLAIN | {"num_key_value_heads": 2, "pad_token_id": 0}
OLD: dict[str, Any] = ENDS | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
SLIDING = COMMON | {"sliding_window": WINDOW}
WIDE_HEADS = COMMON | {"head_dim": 24}
GEMMA = SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """Rope parameters of Transformers 5."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | parameters}


# name -> (configuration class, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "qwen2": ("Qwen2", COMMON | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", WIDE_HEADS),
    "mistral": ("Mistral", SLIDING),
    "phi3": ("Phi3", COMMON | {"sliding_window": 40, "partial_rotary_factor": 0.5}),
    "gemma2": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3Text", GEMMA | {"layer_types": MIXED}),
    "smollm3": ("SmolLM3", COMMON | {"no_rope_layers": [1, 0, 1, 0]}),
    "gpt2": ("GPT2", OLD),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", COMMON),
    "cohere": ("Cohere", COMMON),
    "gemma": ("Gemma", COMMON | {"head_dim": 16}),
    "gpt_bigcode": ("GPTBigCode", OLD),
    "gpt_neo": (
        "GPTNeo",
        ENDS
        | {
            "hidden_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "intermediate_size": 128,
            "max_position_embeddings": POSITIONS,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 100,  # longer than the usual verification text
        },
    ),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "granite": (
        "Granite",
        COMMON
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "llama_dynamic": ("Llama", COMMON | rope("dynamic", factor=2.0)),
    "llama_linear": ("Llama", COMMON | rope("linear", factor=2.0)),
    "llama_llama3": (
        "Llama",
        COMMON
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama_yarn": ("Llama", COMMON | rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "nemotron": ("Nemotron", COMMON),
    "olmo": ("Olmo", COMMON),
    "olmo2": ("Olmo2", COMMON),
    "olmo3": ("Olmo3", SLIDING),
    "opt": (
        "OPT",
        ENDS
        | {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "phi": ("Phi", COMMON),
    "phi3_longrope": (
        "Phi3",
        COMMON
        | {"original_max_position_embeddings": 100}
        | rope("longrope", short_factor=[1.1] * 8, long_factor=[3.0] * 8, original_max_position_embeddings=100),
    ),
    "qwen2_mixed": ("Qwen2", SLIDING | {"use_sliding_window": True, "max_window_layers": 2}),
    "stablelm": ("StableLm", COMMON),
    "starcoder2": ("Starcoder2", SLIDING),
}
# Not supported: name -> (class, arguments, what the refusal says). The first ones are refused by their configuration.
BY_CONFIG: dict[str, tuple[str, dict[str, Any], str]] = {
    "bart": ("Bart", {}, "encoder|max_position|'bart'"),
    "bert": ("Bert", PLAIN, "'bert' model is an encoder"),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": 4, "n_head": 4}, "'bloom' model"),
    "jamba": ("Jamba", COMMON, "jamba: layers of type linear_attention"),
    "llama4": ("Llama4Text", COMMON | {"head_dim": 16, "attention_chunk_size": 32}, "llama4_text: .*chunked_attention"),
    "mamba": ("Mamba", {"hidden_size": WIDTH, "num_hidden_layers": 4}, "'mamba' model"),
    "mamba2": ("Mamba2", {"hidden_size": WIDTH, "num_heads": 8, "head_dim": 16}, "'mamba2' model"),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_layers": 4, "n_heads": 4}, "'mpt' model"),
    "rwkv": ("Rwkv", {"hidden_size": WIDTH, "num_hidden_layers": 4}, "'rwkv' model"),
    "t5": ("T5", {"d_model": WIDTH}, "'t5' is no decoder-only"),
}
BY_GRAPH: dict[str, tuple[str, dict[str, Any], str]] = {
    "cohere2": ("Cohere2", SLIDING, "Cohere2ForCausalLM: .*differ"),
    "deepseek_v2": ("DeepseekV2", COMMON, "DeepseekV2ForCausalLM .*cannot be built"),
    "ernie4_5": ("Ernie4_5", COMMON, "Ernie4_5ForCausalLM: .*decoder layer 0"),
    "exaone4": ("Exaone4", SLIDING, "Exaone4ForCausalLM: .*differ"),
    "falcon": (
        "Falcon",
        ENDS
        | {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "alibi": True,
        },
        r"FalconForCausalLM \(falcon\): .*weights",
    ),
    "gemma3_27b": ("Gemma3Text", GEMMA | {"query_pre_attn_scalar": 24}, "Gemma3ForCausalLM: .*decoder layer 0"),
    "gemma3n": (
        "Gemma3nText",
        SLIDING
        | {"num_hidden_layers": 5, "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 8}
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16},
        "Gemma3nForCausalLM .*cannot be built",
    ),
    "glm": ("Glm", COMMON | {"head_dim": 16}, r"GlmForCausalLM \(glm\): .*weights"),
    "gpt_neox_sequential": ("GPTNeoX", PLAIN | {"use_parallel_residual": False}, "GPTNeoXForCausalLM: .*layer 0"),
    "gpt_oss": (
        "GptOss",
        SLIDING | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "GptOssForCausalLM: .*no Attention node",
    ),
    "gptj": ("GPTJ", OLD | {"rotary_dim": 8}, "GPTJForCausalLM: .*decoder layer 0"),
    "helium": ("Helium", COMMON | {"head_dim": 16}, "HeliumForCausalLM: .*decoder layer 0"),
    "hunyuan": ("HunYuanDenseV1", COMMON | {"head_dim": 16}, "HunYuanDenseV1ForCausalLM: .*decoder layer 0"),
    "lfm2": ("Lfm2", COMMON, r"Lfm2ForCausalLM \(lfm2\) cannot be built"),
    "mixtral": (
        "Mixtral",
        COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "MixtralForCausalLM: expected one tensor to cross",
    ),
    "qwen2_moe": ("Qwen2Moe", COMMON | EXPERTS, "Qwen2MoeForCausalLM: expected one tensor to cross"),
    "qwen3_moe": ("Qwen3Moe", WIDE_HEADS | EXPERTS, "Qwen3MoeForCausalLM: expected one tensor to cross"),
    "seed_oss": ("SeedOss", COMMON | {"head_dim": 16}, r"SeedOssForCausalLM \(seed_oss\): .*weights"),
}


def config_of(name: str, **changes: Any) -> Any:
    """The Transformers configuration of a family."""
    kind, arguments = next(table[name] for table in (FAMILIES, MORE, BY_CONFIG, BY_GRAPH) if name in table)[:2]
    return getattr(transformers, f"{kind}Config")(**arguments | changes)


def shake(model: torch.nn.Module, scale: float = 1.0, seed: int = 0) -> None:
    """New random weights in place: matrices keep the size of what they multiply; norms and biases leave 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                weight.add_(noise * 0.1)
            else:
                table = any(part in name for part in ("embed", "wte", "wpe"))
                weight.copy_(noise * scale * (1.0 if table else 1.2 * weight.shape[-1] ** -0.5))


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token per byte, and special ones in front."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def make(name: str, folder: Path, scale: float = 1.0, **changes: Any) -> Path:
    """Write a model of the family ``name`` with a tokenizer into ``folder``; ``changes`` go into its configuration."""
    torch.manual_seed(0)
    with reference.quiet():
        model = AutoModelForCausalLM.from_config(config_of(name, **changes))
        shake(model, scale)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def random_probe(config: Any, window: int, seed: int = 0, scale: float = 1.0) -> Probe:
    """A probe with weights in every part, so that each of its features moves the scores; odd seeds give spans.

    It reads three more tokens as the question than stay in any case.
    """
    torch.manual_seed(seed)
    probe = Probe(config.hidden_size, config.num_attention_heads, window + 3, window, span=5 if seed % 2 else 1)
    with torch.no_grad():
        probe.skip.weight.copy_(torch.randn(probe.skip.weight.shape) * 0.3)
        for parameter in probe.parameters():
            parameter.mul_(scale)
    return probe.eval()


def ids(count: int, seed: int = 0, low: int = 3, high: int = VOCABULARY) -> list[int]:
    """Random token ids; a narrow range makes tokens repeat, which lexical features need."""
    return [int(i) for i in np.random.default_rng(seed).integers(low, high, count)]


def prune_stages(config: Any, stages: Sequence[Stage]) -> list[PruneStage]:
    """Each stage with a random probe of its own."""
    probes = [random_probe(config, s.window, seed) for seed, s in enumerate(stages, 1)]
    return [PruneStage(s, probe.arrays(), probe.queries) for s, probe in zip(stages, probes, strict=True)]


def exported(model: Path, out: Path, stages: Sequence[Stage], dtype: str = "float32") -> list[Probe]:
    """Build the graph of ``model`` into ``out``; returns the probes of its stages."""
    resolved = source.resolve(str(model))
    pruning = prune_stages(resolved.config, stages)
    out.mkdir(parents=True, exist_ok=True)
    with reference.quiet():
        decoder.save(decoder.build_graph(resolved, dtype, pruning), out)
    return [Probe.from_arrays(p.probe, p.queries, p.stage.window) for p in pruning]


def verified(
    model: Path,
    out: Path,
    stages: Sequence[Stage],
    probes: Sequence[Probe | None],
    dtype: str = "float32",
    **options: Any,
) -> verify.Verification:
    """Verify the graph in ``out`` against ``model``, with two real prompts of 70 and 61 tokens."""
    resolved = source.resolve(str(model))
    config = resolved.config
    arguments: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "dtype": dtype,
        "seed": 0,
        "name": resolved.architecture,
        "prompts": [ids(70, 1, high=40), ids(61, 2)],
    }
    with reference.reference(resolved) as frozen:
        return verify.verify(out, decoder.GRAPH, frozen, stages, probes, **arguments | options)


class Runner:
    """One graph as a whole in ONNX Runtime, with its cache carried from call to call."""

    def __init__(self, graph: ir.Model | Path, folder: Path) -> None:
        path = graph
        if isinstance(graph, ir.Model):
            path = folder / f"{len(list(folder.iterdir()))}.onnx"
            ir.save(graph, path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.cache: dict[str, np.ndarray] = {}

    def __call__(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        """One call that goes on from the cache."""
        batch = len(feeds["input_ids"])
        for name, spec in self.inputs.items():
            if name.startswith("past_") and name not in self.cache:
                kind = np.int64 if spec.type == "tensor(int64)" else np.float32
                dims = [batch if i == 0 else d if isinstance(d, int) else 0 for i, d in enumerate(spec.shape)]
                self.cache[name] = np.zeros(dims, kind)
        given = {name: np.asarray(value) for name, value in feeds.items()}
        outputs: Mapping[str, np.ndarray] = dict(
            zip(self.outputs, self.session.run(None, self.cache | given), strict=True)
        )
        for name in self.cache:
            present = name.replace("past_key_values", "present").replace("past_positions", "present_positions")
            self.cache[name] = outputs[present]
        return dict(outputs)

    def fresh(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        """One call with an empty cache."""
        self.cache = {}
        return self(**feeds)


def batch(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) of a left-padded batch; padding has position -1, and id 7, as valid as any."""
    size = max(map(len, prompts))
    tokens, positions = np.full((len(prompts), size), 7), np.full((len(prompts), size), -1)
    for row, prompt in enumerate(prompts):
        tokens[row, size - len(prompt) :] = prompt
        positions[row, size - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions
