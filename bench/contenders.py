"""What answers a prompt greedily behind the same few calls, one in each worker process: our engines, and bare graphs.

Knows nothing of how files are made, of rounds or of results. A runtime is imported when it is opened, so that one
interpreter need not have them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Options = Mapping[str, Any]


class Runner(ABC):
    """A loaded model. ``prefill`` begins anew; ids and logits are those of one row."""

    vocab: int

    @abstractmethod
    def prefill(self, ids: Sequence[int], new: int) -> int:
        """Read a prompt, with room for so many more tokens; returns the likeliest next id."""

    @abstractmethod
    def step(self, token: int) -> int:
        """Read one more id; returns the likeliest next one."""

    @abstractmethod
    def logits(self) -> Any:
        """(vocab,) float32 of the last call."""

    def after(self, ids: Sequence[int]) -> Any:
        """(vocab,) float32 logits after a prompt whose last id is read as a generated one is."""
        self.prefill(ids[:-1], 1)
        self.step(ids[-1])
        return self.logits()

    def ready(self, room: int) -> None:  # noqa: B027 (most have nothing to do)
        """Make what an application makes once, for so many tokens."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Held by keys and values now, spare room included."""


class Fstq(Runner):
    """An engine of ours. options: keep, the share of prompt tokens that stays."""

    def __init__(self, path: Path, threads: int, options: Options) -> None:
        from fstq_infer.bundle import Bundle
        from fstq_infer.runtime.load import open_engine
        from fstq_infer.runtime.options import keep_counts, keep_ratios

        bundle = Bundle.open(path)
        self.engine = open_engine(bundle, directory=path.with_suffix(".engine"), threads=threads)
        self.vocab, self.stages = self.engine.vocab_size, self.engine.stages
        ratios = keep_ratios(options["keep"], self.stages)
        self.counts: Callable[[int], list[int]] = lambda prompt: keep_counts(prompt, ratios, self.stages)
        self.one = np.ones((1, len(self.stages)), np.int64)

    def prefill(self, ids: Sequence[int], new: int) -> int:
        self.seen, self.last = len(ids), None  # whose caches go before new ones are made
        keep = np.array([self.counts(self.seen)], np.int64).reshape(1, len(self.stages))
        given = np.array([ids], np.int64)
        self.last = self.engine.forward(given, np.arange(self.seen)[None], keep, self.engine.empty_cache(1))
        return int(self.last.logits[0].argmax())

    def step(self, token: int) -> int:
        self.last = self.engine.forward(np.array([[token]]), np.array([[self.seen]]), self.one, self.last.cache)
        self.seen += 1
        return int(self.last.logits[0].argmax())

    def logits(self) -> Any:
        return self.last.logits[0].astype(np.float32)

    def kv_bytes(self) -> int:
        return int(self.last.cache.bytes)


class Ort(Runner):
    """A graph as an exporter left it, in onnxruntime: present keys and values are bound as past ones, never copied."""

    def __init__(self, path: Path, threads: int, options: Options) -> None:
        import onnxruntime

        self.ort, chosen = onnxruntime, onnxruntime.SessionOptions()
        chosen.intra_op_num_threads, chosen.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(str(path / "model.onnx"), chosen, ["CPUExecutionProvider"])
        self.ports = {port.name: port for port in self.session.get_inputs()}
        self.outputs = [port.name for port in self.session.get_outputs()]
        self.vocab = int(self.session.get_outputs()[0].shape[-1])

    def prefill(self, ids: Sequence[int], new: int) -> int:
        self.seen = 0
        self.past = {
            name: self.ort.OrtValue.ortvalue_from_numpy(np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32))
            for name, port in self.ports.items()
            if name.startswith("past_")
        }
        return self._run(np.array([ids], np.int64))

    def step(self, token: int) -> int:
        return self._run(np.array([[token]], np.int64))

    def _run(self, ids: Any) -> int:
        binding, count = self.session.io_binding(), ids.shape[1]
        self.seen += count
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, self.seen), np.int64))
        if "position_ids" in self.ports:
            binding.bind_cpu_input("position_ids", np.arange(self.seen - count, self.seen)[None])
        for name, value in self.past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.last = found["logits"].numpy()[0, -1]
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return int(self.last.argmax())

    def logits(self) -> Any:
        return self.last.astype(np.float32)

    def kv_bytes(self) -> int:
        return sum(value.numpy().nbytes for value in self.past.values())
