"""Small PEFT adapters and graph ports for tests, written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fstq_infer.adapters import tensors
from fstq_infer.adapters.ports import Linear, LoraPorts

PREFIX = "base_model.model."
MODULES = {f"model.layers.{n}.{m}": (8, 12) for n in range(2) for m in ("self_attn.qkv_proj", "mlp.down_proj")}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 6,
    "bias": "none",
    "target_modules": ["qkv_proj", "down_proj"],
    "base_model_name_or_path": "somewhere/tiny",
}


def ports(rank: int = 4) -> LoraPorts:
    """qkv_proj lies in the graph as two layers, the second of which has its rows in another order."""
    linears = []
    for n in range(2):
        module = f"model.layers.{n}.self_attn.qkv_proj"
        linears.append(Linear(f"{n}.self_attn.q_proj", module, 8, 6, 12, ((0, 6),)))
        linears.append(Linear(f"{n}.self_attn.k_proj", module, 8, 6, 12, ((9, 3), (6, 3))))
        linears.append(Linear(f"{n}.mlp.down_proj", f"model.layers.{n}.mlp.down_proj", 8, 12, 12, ((0, 12),)))
    return LoraPorts(rank, tuple(linears), {})


def matrices(seed: int = 0, rank: int = 2) -> dict[str, np.ndarray]:
    """A and B of every module under PEFT's keys."""
    rng = np.random.default_rng(seed)
    found = {}
    for module, (inputs, outputs) in MODULES.items():
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            found[f"{PREFIX}{module}.lora_{side}.weight"] = rng.standard_normal(shape).astype(np.float32)
    return found


def write(folder: Path, arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """A PEFT folder; ``changes`` go into its configuration, None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(tensors.encode(matrices() if arrays is None else arrays))
    return folder
