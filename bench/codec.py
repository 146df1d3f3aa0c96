"""Speed of the message codec on one core, and bits per parameter beside the entropy of what is sent.

python bench/codec.py      some minutes; writes results/codec.json

Parameters are those of the dense delta. `encode` is all of Compressor.compress: from named arrays over selection,
quantizing and coding to bytes. `decode` is the reverse: from bytes to named dense arrays, all checks included. Times
are the best of a few runs in CPU seconds of this process, which has one thread: what else runs does not count.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import target, write

from fstq_infer.federated import message as messages
from fstq_infer.federated.allocate import Everything, Fixed
from fstq_infer.federated.compress import Compressor, decompress
from fstq_infer.federated.feedback import ErrorFeedback, Forget
from fstq_infer.federated.layer import Layer
from fstq_infer.federated.select import Fisher, Magnitude, Random
from fstq_infer.federated.tensors import TensorManifest

REPEATS = 5
BASE = bytes(16)
MODELS = {  # hidden, key and value, feed-forward width, layers, LoRA rank on all seven linear layers
    "0.5B, rank 8": (896, 128, 4864, 24, 8),
    "7B, rank 16": (3584, 512, 18944, 28, 16),
}
DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3)


def shapes(hidden: int, keys: int, wide: int, layers: int, rank: int) -> dict[str, tuple[int, int]]:
    """LoRA tensors of a decoder, by name."""
    found = {}
    for layer in range(layers):
        for name, (out, into) in {
            "q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden),
            "gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide),
        }.items():  # fmt: skip
            found[f"{layer}.{name}.lora_A"], found[f"{layer}.{name}.lora_B"] = (rank, into), (out, rank)
    return found


def best(run: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of the fastest run, its result)."""
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        result = run()
        seconds.append(time.process_time() - began)
    return min(seconds), result


def histogram_bits(histogram: Any) -> float:
    """Entropy of all items of a histogram together."""
    counts = np.asarray(histogram, np.float64)
    seen = counts[counts > 0]
    return float((seen * np.log2(seen.sum() / seen)).sum())


def entropy(layer: Layer, sizes: np.ndarray) -> float:
    """Bits that the support of each tensor, signs and levels cannot go below as independent draws; raw values count."""
    bits = sum(
        histogram_bits([count, size - count]) for count, size in zip(layer.counts.tolist(), sizes.tolist(), strict=True)
    )
    for block in layer.blocks.values():
        bits += len(block.signs) + 8 * block.raw.nbytes + histogram_bits(np.bincount(block.symbols))
    return bits


def measure(
    what: str, compressor: Compressor, delta: Any, fisher: Any = None, budget: int | None = None
) -> dict[str, Any]:
    """One row: rates in millions of parameters a second, sizes in bits for each."""
    manifest = compressor.manifest
    encode_s, (blob, _) = best(lambda: compressor.compress(delta, fisher, None, budget))
    decode_s, _ = best(lambda: decompress(blob, manifest))
    message = messages.decode(blob, manifest)
    left, bound = manifest.sizes, 0.0
    for layer in message.layers:
        bound += entropy(layer, left)
        left = left - layer.counts
    millions = manifest.parameters / 1e6
    row = {
        "what": what,
        "parameters": manifest.parameters,
        "bytes": len(blob),
        "budget": budget,
        "encode_millions_per_second": round(millions / encode_s, 1),
        "decode_millions_per_second": round(millions / decode_s, 1),
        "bits_per_parameter": round(8 * len(blob) / manifest.parameters, 4),
        "times_smaller_than_fp32": round(4 * manifest.parameters / len(blob), 1),
        "size_over_entropy": round(8 * len(blob) / bound, 4),
    }
    print(row)
    return row


def main() -> None:
    rows = []
    for model, widths in MODELS.items():
        rng = np.random.default_rng(0)
        names = shapes(*widths)
        delta = {name: (1e-3 * rng.standard_t(4, shape)).astype(np.float32) for name, shape in names.items()}
        manifest = TensorManifest.of(delta)
        for code, density in [("lloyd2", density) for density in DENSITIES] + [("lloyd1", 0.05), ("lloyd3", 0.05)]:
            # A random selector gives Bernoulli supports, the case in which the entropy is known; its draws take long,
            # so speed is that of the selector that is used.
            drawn = Compressor(manifest, BASE, Random(), Fixed(density, code), Forget())
            row = measure(
                f"{model}, {code}, density {density:g}",
                Compressor(manifest, BASE, Magnitude(), drawn.allocation, Forget()),
                delta,
            )
            blob, _ = drawn.compress(delta)
            (layer,) = messages.decode(blob, manifest).layers
            row["size_over_entropy"] = round(8 * len(blob) / entropy(layer, manifest.sizes), 4)
            rows.append(row | {"model": model, "code": code, "density": density})
        fisher = {name: rng.exponential(1e-8, shape).astype(np.float32) for name, shape in names.items()}
        for share in (0.01, 0.025):
            whole = Compressor(manifest, BASE, Fisher(), feedback=ErrorFeedback())
            budget = int(share * 4 * manifest.parameters)
            rows.append(
                measure(f"{model}, preset fstq, {share:.1%} of fp32", whole, delta, fisher, budget) | {"model": model}
            )
        rows.append(
            measure(f"{model}, preset paper", Compressor.preset("paper", manifest, BASE), delta, fisher)
            | {"model": model}
        )
        lossless = Compressor(manifest, BASE, Magnitude(), Everything(), Forget())
        rows.append(measure(f"{model}, preset lossless", lossless, delta) | {"model": model})
    fixed = [row for row in rows if "density" in row]
    figures = {}
    for model in MODELS:
        mine = [row for row in fixed if row["model"] == model]
        usual = next(row for row in mine if row["density"] == 0.05 and row["code"] == "lloyd2")
        figures[f"{model}: encode, millions of parameters a second, density 0.05"] = target(
            usual["encode_millions_per_second"], 50
        )
        figures[f"{model}: decode, millions of parameters a second, density 0.05"] = target(
            usual["decode_millions_per_second"], 100
        )
        figures[f"{model}: decode, slowest density"] = target(
            min(row["decode_millions_per_second"] for row in mine), 100
        )
        figures[f"{model}: encode, slowest density"] = target(
            min(row["encode_millions_per_second"] for row in mine), 50
        )
        worst = max(row["size_over_entropy"] for row in mine)
        figures[f"{model}: size over entropy, worst density"] = target(worst, 1.03, at_least=False)
    write("codec", "python bench/codec.py", rows, figures)


if __name__ == "__main__":
    main()
