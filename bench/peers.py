"""Other projects' runtimes behind the calls of bench/contenders.py. Each is imported when it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Options, Runner


class Transformers(Runner):
    """Hugging Face, greedy steps without generate()'s own work. options: dtype, compile."""

    def __init__(self, path: Path, threads: int, options: Options) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.transformers = torch, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, options["dtype"]), attn_implementation="sdpa"
        ).eval()
        self.vocab = int(self.model.config.vocab_size)
        self.compiled = bool(options.get("compile"))
        self.decode = torch.compile(self.model, dynamic=False) if self.compiled else self.model

    def prefill(self, ids: Sequence[int], new: int) -> int:
        if self.compiled:  # shapes that stay: decode is compiled once for a prompt length
            room = len(ids) + new
            self.cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=room)
        else:
            self.cache = self.transformers.DynamicCache(config=self.model.config)
        self.seen = 0
        return self._run(self.torch.tensor([list(ids)]), self.model)

    def step(self, token: int) -> int:
        return self._run(self.torch.tensor([[token]]), self.decode)

    def _run(self, ids: Any, model: Any) -> int:
        at = self.torch.arange(self.seen, self.seen + ids.shape[1])[None]
        self.seen += ids.shape[1]
        with self.torch.inference_mode():
            out = model(input_ids=ids, position_ids=at, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.last = out.logits[0, -1]
            return int(self.last.argmax())

    def logits(self) -> Any:
        return self.last.float().numpy()

    def kv_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class GenAI(Runner):
    """onnxruntime-genai; its own loop picks tokens, buffers of keys and values are shared."""

    def __init__(self, path: Path, threads: int, options: Options) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)
        described = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = described["decoder"]
        self.vocab = int(described["vocab_size"])
        self.per_token = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * 4

    def prefill(self, ids: Sequence[int], new: int) -> int:
        self._append(ids, len(ids) + new)
        return self.step(0)

    def _append(self, ids: Sequence[int], room: int) -> None:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=room, min_length=room)
        self.room, self.generator = room, self.genai.Generator(self.model, params)
        self.generator.append_tokens(np.array(list(ids), np.int32))

    def step(self, token: int) -> int:
        self.generator.generate_next_token()  # reads the token it picked before
        return int(self.generator.get_next_tokens()[0])

    def after(self, ids: Sequence[int]) -> Any:
        self._append(ids[:-1], len(ids) + 1)
        self.generator.append_tokens(np.array(ids[-1:], np.int32))
        return self.logits()

    def logits(self) -> Any:
        return np.asarray(self.generator.get_logits(), np.float32).reshape(-1)[-self.vocab :]

    def kv_bytes(self) -> int:
        return self.per_token * self.room


class LlamaCpp(Runner):
    """llama.cpp through llama-cpp-python's C interface. options: flash, repack (use_extra_bufts), ubatch."""

    def __init__(self, path: Path, threads: int, options: Options) -> None:
        import llama_cpp

        self.c, self.threads, self.options, self.context = llama_cpp, threads, options, None
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = options["repack"]
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def ready(self, room: int) -> None:
        if self.context is not None:
            self.c.llama_free(self.context)
        params = self.c.llama_context_default_params()
        params.n_ctx = params.n_batch = room
        params.n_ubatch = min(room, self.options["ubatch"])
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = int(self.options["flash"])
        params.no_perf = True
        self.room, self.context = room, self.c.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {room} tokens")

    def prefill(self, ids: Sequence[int], new: int) -> int:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
        return self._run(ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: Sequence[int]) -> int:
        tokens = (self.c.llama_token * len(ids))(*ids)
        status = self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        found = self.c.llama_get_logits_ith(self.context, -1)
        self.last = np.ctypeslib.as_array(found, shape=(self.vocab,))
        return int(self.last.argmax())

    def logits(self) -> Any:
        return self.last.copy()

    def kv_bytes(self) -> int:
        layers, heads = self.c.llama_model_n_layer(self.model), self.c.llama_model_n_head_kv(self.model)
        width = self.c.llama_model_n_embd(self.model) // self.c.llama_model_n_head(self.model)
        return int(2 * layers * heads * width * 2 * self.c.llama_n_ctx(self.context))  # float16
