"""Adapters in an engine: what none costs, what one costs, what a switch and a mixed batch cost.

python bench/adapters.py MODEL      a Qwen2.5-0.5B shape; some minutes; writes results/adapters.json

Two exports of one checkpoint, without adapters and with; of the second with none, with one, and with one for each row
of a batch. Rounds alternate between all settings; the least time of each counts, since other work only adds to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import target, write
from fstq_export import linears, source
from fstq_export.adapters import Wanted
from fstq_export.pipeline import Request, export

from fstq_infer import Generator
from fstq_infer.adapters import store, tensors
from fstq_infer.adapters.store import Adapter
from fstq_infer.bundle import Bundle
from fstq_infer.runtime.load import build_engine

PROMPT, ROUNDS, STEPS, SWITCHES = 256, 5, 8, 50
RANK = 8


def adapter(model: Path, folder: Path, seed: int) -> Path:
    """A PEFT folder with random matrices for every linear layer."""
    rng = np.random.default_rng(seed)
    shapes, _ = linears.shapes_of(source.resolve(str(model)))
    arrays = {}
    for module, (inputs, outputs) in shapes.items():
        for side, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            array = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            arrays[f"base_model.model.{module}.lora_{side}.weight"] = array
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": "all-linear",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(tensors.encode(arrays))
    return folder


def once(engine: Any, ids: Any) -> tuple[float, float]:
    """(prefill, one decode step) in seconds of processor time."""
    stages = len(engine.stages)
    cache = engine.empty_cache(len(ids))
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    began = time.process_time()
    step = engine.forward(ids, positions, np.full((len(ids), stages), ids.shape[1]), cache)
    prefilled = time.process_time()
    for n in range(STEPS):
        step = engine.forward(
            ids[:, :1], positions[:, :1] + ids.shape[1] + n, np.ones((len(ids), stages), int), step.cache
        )
    return prefilled - began, (time.process_time() - prefilled) / STEPS


def switching(engine: Any, adapters: list[Adapter], fresh: bool) -> float:
    """Milliseconds of a switch between loaded adapters, the median; fresh: each is used for the first time."""
    taken = []
    for number in range(SWITCHES):
        chosen = adapters[number % len(adapters)]
        chosen = replace(chosen) if fresh else chosen
        began = time.perf_counter()
        engine.adapted([chosen])
        taken.append(time.perf_counter() - began)
    return float(np.median(taken) * 1e3)


def nodes(bundle: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Operators of the engine's graph without adapters, as ONNX Runtime has optimised it."""
    graph = onnx.load(build_engine(Bundle.open(bundle)) / "model.onnx", load_external_data=False).graph
    return [(node.op_type, node.name, tuple(node.input)) for node in graph.node]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = ["one", "two"]
        folders = [adapter(model, folder / name, seed) for seed, name in enumerate(names)]
        plain, adapted = folder / "plain.bundle", folder / "adapted.bundle"
        export(Request(str(model), plain))
        export(Request(str(model), adapted, adapters=Wanted.parse([], "all")))
        first, second = (Generator.load(path, threads=1) for path in (plain, adapted))
        added = time.perf_counter()
        for name, given in zip(names, folders, strict=True):
            store.add(adapted, name, given)
        added = (time.perf_counter() - added) / len(names)
        loaded = [store.load(Bundle.open(adapted, checksums=False), name) for name in names]
        settings = {
            "exported without adapters": (first.engine, 1),
            "no adapter": (second.engine, 1),
            f"adapter of rank {RANK}": (second.engine.adapted([loaded[0]]), 1),
            "batch of 2, one adapter": (second.engine.adapted([loaded[0]]), 2),
            "batch of 2, an adapter each": (second.engine.adapted(loaded), 2),
        }
        ids = np.random.default_rng(0).integers(0, second.engine.vocab_size, (2, PROMPT))
        best = {name: (np.inf, np.inf) for name in settings}
        for round_ in range(ROUNDS):
            for name, (engine, rows) in list(settings.items())[:: 1 if round_ % 2 else -1]:
                found = once(engine, ids[:rows])
                best[name] = (min(best[name][0], found[0]), min(best[name][1], found[1]))
        rows: list[dict[str, Any]] = [
            {"setting": name, "prompt": PROMPT, "prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3}
            for name, (prefill, decode) in best.items()
        ]
        switch = switching(second.engine, loaded, fresh=True)
        again = switching(second.engine, loaded, fresh=False)
        size = sum(array.nbytes for array in loaded[0].arrays.values())
        rows.append({"setting": "switch to a loaded adapter, its first use", "milliseconds": switch, "bytes": size})
        rows.append({"setting": "switch to a loaded adapter again", "milliseconds": again, "bytes": size})
        equal = nodes(plain) == nodes(adapted)
        rows.append({"setting": "without an adapter, engines have the same optimised graph", "equal": equal})
        rows.append({"setting": "fstq adapter add", "milliseconds": added * 1e3, "bytes": size})
        base, none = best["exported without adapters"], best["no adapter"]
    figures = {
        "prefill without an adapter over a graph without inputs": target(none[0] / base[0], 1.01, at_least=False),
        "decoding without an adapter over a graph without inputs": target(none[1] / base[1], 1.01, at_least=False),
        "the engine's graph without an adapter equals one exported without": target(float(equal), 1.0),
        "milliseconds of a switch to a loaded adapter": target(switch, 1.0, at_least=False),
    }
    write("adapters", "python bench/adapters.py MODEL (Qwen2.5-0.5B shape, one thread, processor time)", rows, figures)


if __name__ == "__main__":
    main()
