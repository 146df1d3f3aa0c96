"""A process that loads one runtime and answers requests, a line of JSON each: measure, logits, stream.

python bench/worker.py RUNTIME PATH THREADS OPTIONS      started by bench/inference.py, in an interpreter with RUNTIME

Whatever the runtime prints goes to standard error. RUNTIME "stream" loads nothing and measures memory instead.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Fstq, Ort, Runner
from peers import GenAI, LlamaCpp, Transformers

TIMES = 5  # passes over memory, of which the fastest counts
RUNTIMES: dict[str, type[Runner]] = {
    "fstq": Fstq,
    "onnxruntime": Ort,
    "transformers": Transformers,
    "onnxruntime-genai": GenAI,
    "llama.cpp": LlamaCpp,
}
INSTALL = {
    "torch": "torch",
    "transformers": "'transformers>=5'",
    "onnxruntime_genai": "onnxruntime-genai",
    "onnxruntime": "onnxruntime",
    "llama_cpp": "llama-cpp-python",
    "fstq_infer": "'fstq-infer[ort]'",
}


def prompt(vocab: int, tokens: int) -> list[int]:
    """The same random ids in every process."""
    ids: list[int] = np.random.default_rng(tokens).integers(2, vocab, tokens).tolist()
    return ids


def measure(runner: Runner, tokens: int, new: int) -> dict[str, Any]:
    """One greedy answer that ignores ends. Seconds to the first token and for all, bytes of the cache."""
    ids = prompt(runner.vocab, tokens)
    clock = time.perf_counter
    began = clock()
    token = runner.prefill(ids, new)
    first = clock()
    for _ in range(new - 1):
        token = runner.step(token)
    ended = clock()
    return {"ttft_s": first - began, "decode_s": ended - first, "total_s": ended - began, "kv_bytes": runner.kv_bytes()}


def logits(runner: Runner, tokens: int) -> dict[str, Any]:
    """Of every k-th id: some 512 of them."""
    found = runner.after(prompt(runner.vocab, tokens))
    return {"logits": [float(number) for number in found[:: max(1, runner.vocab // 512)]]}


def memory() -> dict[str, int]:
    """Bytes: largest and present resident memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {"peak_rss": int(fields["VmHWM"].split()[0]) * 1024, "rss": int(fields["VmRSS"].split()[0]) * 1024}


class Stream:
    """Bytes per second of memory, by threads over arrays far larger than the caches."""

    def __init__(self, threads: int, numbers: int) -> None:
        """numbers: float32 ones in each of three arrays."""
        self.parts = [[np.ones(numbers // threads, np.float32) for _ in range(3)] for _ in range(threads)]

    def measure(self) -> dict[str, Any]:
        """copy: a = b; triad: a = b + s c (in two passes: five arrays move); read: a dot product of two arrays."""

        def triad(a: Any, b: Any, c: Any) -> None:
            np.multiply(c, np.float32(0.5), out=a)
            np.add(a, b, out=a)

        kinds: dict[str, tuple[int, Callable[[Any, Any, Any], Any]]] = {
            "copy": (2, lambda a, b, _c: np.copyto(a, b)),
            "triad": (5, triad),
            "read": (2, lambda _a, b, c: np.dot(b, c)),
        }
        moved = sum(part[0].nbytes for part in self.parts)
        return {f"{name}_bytes_per_s": arrays * moved / self._fastest(work) for name, (arrays, work) in kinds.items()}

    def _fastest(self, work: Callable[[Any, Any, Any], Any]) -> float:
        taken = []
        for _ in range(TIMES):
            threads = [threading.Thread(target=work, args=part) for part in self.parts]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            taken.append(time.perf_counter() - began)
        return min(taken)


def answer(loaded: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for; and the memory that this process has held."""
    if isinstance(loaded, Stream):
        return loaded.measure()
    tokens, new = int(request["prompt"]), int(request["new"])
    if request["do"] == "logits":
        return logits(loaded, tokens)
    if request["do"] == "ready":
        loaded.ready(tokens + new)
        return {}
    return measure(loaded, tokens, new) | memory()


def load(runtime: str, path: str, threads: int, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What was loaded, and what is said of it."""
    if runtime == "stream":
        return Stream(threads, options["numbers"]), {}
    began = time.perf_counter()
    try:
        runner = RUNTIMES[runtime](Path(path), threads, options)
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        return None, {"missing": module, "install": f"pip install {INSTALL.get(module, module)}"}
    return runner, {"load_s": time.perf_counter() - began, **memory()}


def main() -> None:
    runtime, path, threads, options = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    try:
        loaded, about = load(runtime, path, int(threads), json.loads(options))
        say(about)
        for line in sys.stdin:
            say(answer(loaded, json.loads(line)))
    except Exception as error:  # runtimes' exceptions have no common base; the bench reports them
        say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
