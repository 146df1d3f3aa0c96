"""Dense against pruned on a CUDA machine, with whichever of tensorrt, tensorrt_rtx and onnxruntime-gpu works.

python bench/gpu.py BUNDLE [--prompt 1024] [--new 64] [--keep 1.0,0.5,0.25] [--repeats 5]      writes results/gpu.json

Each engine is compared with the bundle's own graph on the CPU first. The roofline of decoding is the bandwidth of a
copy on the device over the bytes that one token has to read: weights once, and the cache. Without a GPU it says so and
ends.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import target, write
from fstq_engines import parity
from fstq_engines.tensorrt import gpu
from fstq_engines.tensorrt.build import agreement

from fstq_infer.bundle import Bundle
from fstq_infer.errors import FstqError
from fstq_infer.runtime.bench import measure
from fstq_infer.runtime.cuda import ON_DEVICE, Cuda
from fstq_infer.runtime.load import open_engine
from fstq_infer.runtime.ort import OrtEngine

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-gpu")
COPY, ROUNDS = 256 << 20, 20  # bytes copied on the device, times


def open_backend(bundle: Bundle, backend: str) -> Any:
    """A loaded engine on the GPU; raises FstqError with the reason where there is none."""
    if backend == "onnxruntime-gpu":
        return open_engine(bundle, "ort", provider="cuda")
    return open_engine(bundle, backend)


def bandwidth(cuda: Cuda) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    one, other = cuda.allocate(COPY), cuda.allocate(COPY)
    kind, stream = cuda.kind(ON_DEVICE), cuda("cudaStreamCreate")
    cuda("cudaMemcpyAsync", one, other, COPY, kind, stream)
    cuda("cudaStreamSynchronize", stream)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        cuda("cudaMemcpyAsync", one, other, COPY, kind, stream)
    cuda("cudaStreamSynchronize", stream)
    seconds = time.perf_counter() - began
    for address in (one, other):
        cuda("cudaFree", address)
    return 2 * COPY * ROUNDS / seconds


def compared(bundle: Bundle, engine: Any, half: bool) -> dict[str, Any]:
    """Difference to the bundle's graph on the CPU; raises ParityError where it is too large."""
    cases = parity.cases(bundle.manifest.model, bundle.manifest.stages)
    cases = [case for case in cases if len(case.rows) == 1]
    expected = parity.run(OrtEngine(bundle.path, bundle), cases)
    found = parity.run(engine, cases)
    return asdict(agreement(cases, expected, found, "float16" if half else bundle.manifest.model.dtype))


def weights(bundle: Bundle) -> int:
    """Bytes of the bundle's weights."""
    return sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith("model.onnx"))


def measured(bundle: Bundle, backend: str, options: argparse.Namespace, per_second: float) -> list[dict[str, Any]]:
    """Rows of one backend; one row with the reason where it does not work."""
    try:
        engine = open_backend(bundle, backend)
        half = backend != "onnxruntime-gpu"
        agrees = compared(bundle, engine, half)
        report = measure(engine, options.prompt, options.new, options.keep, options.repeats)
    except FstqError as error:
        print(f"{backend}: {error}")
        return [{"backend": backend, "error": str(error)}]
    size = weights(bundle) // (2 if half and bundle.manifest.model.dtype == "float32" else 1)
    rows = []
    for row in report.rows:
        roof = per_second / (size + row.kv_bytes)
        rows.append({"backend": backend, **asdict(row), "roofline_tokens_per_s": roof, "parity": agrees})
        times = report.rows[0].prefill_s / row.prefill_s
        print(
            f"{backend} keep {row.keep:.2f}: prefill {row.prefill_s * 1e3:.1f} ms ({times:.2f}x), "
            f"decode {row.decode_tokens_per_s:.1f} tok/s ({row.decode_tokens_per_s / roof:.0%} of the roofline)"
        )
    del engine
    gc.collect()
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--keep", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 0.5, 0.25])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    found = gpu.this_gpu()
    if found is None:
        print("skipped: there is no CUDA GPU here that cuda-python can use; nothing was measured")
        sys.exit(0)
    bundle = Bundle.open(options.bundle)
    per_second = bandwidth(Cuda.load())
    rows: list[dict[str, Any]] = [{"gpu": asdict(found), "copy_bytes_per_s": per_second}]
    for backend in BACKENDS:
        rows += measured(bundle, backend, options, per_second)
    targets = {}
    for backend in BACKENDS:
        own = [row for row in rows if row.get("backend") == backend and "keep" in row]
        if len(own) > 1:
            targets[f"{backend}: prefill at keep {own[-1]['keep']} over dense"] = target(
                own[0]["prefill_s"] / own[-1]["prefill_s"], 1.0
            )
    if not targets:
        print("none of tensorrt, tensorrt_rtx and onnxruntime-gpu works here; nothing was measured")
        sys.exit(1)
    write("gpu", f"python bench/gpu.py {options.bundle.name}", rows, targets)


if __name__ == "__main__":
    main()
