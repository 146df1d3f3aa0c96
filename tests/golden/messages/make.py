"""Writes the golden messages of this folder: ``python tests/golden/messages/make.py``. They change with the version.

Inputs are multiples of 2^-20 from a generator written out here: sums of them are exact, so no order of adding matters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fstq_infer.federated.allocate import Fixed, Percentile
from fstq_infer.federated.compress import Compressor
from fstq_infer.federated.feedback import Forget
from fstq_infer.federated.quantize import QUANTIZERS
from fstq_infer.federated.select import Fisher, Magnitude
from fstq_infer.federated.tensors import TensorManifest
from fstq_infer.federated.water import WaterFilling

HERE = Path(__file__).parent
SHAPES = (("q.lora_A", (4, 64)), ("q.lora_B", (48, 4)), ("v.lora_A", (4, 64)), ("v.lora_B", (10, 4)), ("bias", (3,)))
MANIFEST = TensorManifest(SHAPES)
BASE, ROUND, BUDGET = bytes(range(16)), 7, 300


def numbers(seed: int) -> dict[str, NDArray[np.float32]]:
    """Heavy-tailed values by name, of another magnitude in each tensor."""
    state, found = seed, {}
    for number, (name, shape) in enumerate(SHAPES):
        values = []
        for _ in range(int(np.prod(shape))):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            large = 1 << (state >> 60)  # 1 to 32768
            values.append((((state >> 33) % 4096) - 2048) * large / 2.0 ** (20 + number))
        found[name] = np.array(values, np.float32).reshape(shape)
    return found


def compressor(case: str) -> Compressor:
    """The parts that write a case."""
    if case == "paper":
        return Compressor(MANIFEST, BASE, Fisher(0.0), Percentile((0.02, 0.05, 0.1)), Forget())
    if case == "water":
        return Compressor(MANIFEST, BASE, Fisher(), WaterFilling(), Forget())
    name, _, percent = case.partition("-")
    return Compressor(MANIFEST, BASE, Magnitude(), Fixed(int(percent) / 100, name), Forget())


CASES = (*(f"{name}-20" for name in QUANTIZERS), "lloyd2-60", "fp32-100", "paper", "water")


def message(case: str) -> bytes:
    """The bytes of one case."""
    fisher = {name: np.abs(values) for name, values in numbers(2).items()}
    budget = BUDGET if case == "water" else None
    return compressor(case).compress(numbers(1), fisher, budget=budget, round=ROUND)[0]


def main() -> None:
    """Write every case anew."""
    for case in CASES:
        (HERE / f"{case}.fstm").write_bytes(message(case))


if __name__ == "__main__":
    main()
