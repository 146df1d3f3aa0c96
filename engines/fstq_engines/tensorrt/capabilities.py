"""What TensorRT takes, by product, version and GPU architecture: one table. Unknown ones get the most conservative row.

Seen in TensorRT-RTX 1.7.1 and read in the release notes of TensorRT 10.3 to 11: Attention, RotaryEmbedding and
RMSNormalization nodes from 10.14 on, an in-place KV cache update (TensorScatter) from 10.15 on. An Orin (SM 87) has
neither FP8 nor FP4; TensorRT takes constants of FP4 from 10.8 on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

PLAIN, RTX = "tensorrt", "tensorrt_rtx"
TOPK = 3840  # largest K of a TopK


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a graph may hold. Where a node is not supported, the lowering writes it with simpler ones.

    opset: highest that is written. cache_update: TensorScatter into buffers that are input and output at once.
    int4_blocks: weights in blocks of int4, symmetric. fp8, nvfp4: formats of this GPU.
    """

    name: str
    opset: int = 21
    attention: bool = False
    rotary: bool = False
    rms_norm: bool = False
    cache_update: bool = False
    int4_blocks: bool = True
    fp8: bool = False
    nvfp4: bool = False

    def attends(self, dtype: str, width: int) -> bool:
        """Whether there is an Attention kernel for numbers of that type and heads of that width.

        Found by building: none for float32, none for a width of 8, whatever the type.
        """
        return self.attention and dtype != "float32" and width % 8 == 0 and 16 <= width <= 256


CONSERVATIVE = Capabilities("decomposed")
_NODES = Capabilities("nodes", opset=23, attention=True, rotary=True, rms_norm=True)
_UPDATE = replace(_NODES, name="nodes and cache update", opset=24, cache_update=True)
# (first version, row), newest last. Versions above the last one that is known are unknown.
TABLE: dict[str, tuple[tuple[tuple[int, int], Capabilities], ...]] = {
    PLAIN: (((10, 3), CONSERVATIVE), ((10, 14), _NODES), ((10, 15), _UPDATE)),
    RTX: (((1, 7), _UPDATE),),
}
KNOWN_UP_TO = {PLAIN: (11, 99), RTX: (1, 99)}
NVFP4_SINCE = {PLAIN: (10, 8), RTX: (1, 7)}
# SM -> (FP8, NVFP4). Others have neither.
FORMATS: dict[int, tuple[bool, bool]] = {
    89: (True, False),
    90: (True, False),
    100: (True, True),
    101: (True, True),
    103: (True, True),
    110: (True, True),
    120: (True, True),
    121: (True, True),
}


def capabilities(product: str, version: str, sm: int) -> Capabilities:
    """The row of a product (``tensorrt``, ``tensorrt_rtx``), its version and a GPU architecture, such as 87."""
    row, fp4 = CONSERVATIVE, False
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is not None and product in TABLE:
        found = (int(match[1]), int(match[2]))
        if found <= KNOWN_UP_TO[product]:
            row = next((r for first, r in reversed(TABLE[product]) if found >= first), CONSERVATIVE)
            fp4 = found >= NVFP4_SINCE[product]
    fp8, nvfp4 = FORMATS.get(sm, (False, False))
    return replace(row, fp8=fp8, nvfp4=nvfp4 and fp4)
