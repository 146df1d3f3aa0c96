"""Pass: rotary embedding as Transformers computes it.

Mends what the exporter reads wrongly: nested rope parameters (Gemma 3), and angles in pairs instead of halves (Cohere).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from fstq_export.passes.scope import layer_of


class RotaryTables(InPlacePass):
    """Replace cos/sin tables that differ from the model's own rotary module, and cut rows that no position reaches.

    rotary: the module, called as ``rotary(x, position_ids[, layer_type])``, or None. layer_types: per layer, or None.
    positions: length of the longest context. ``mended`` names what was replaced.
    """

    def __init__(self, rotary: torch.nn.Module | None, layer_types: Sequence[str] | None, positions: int) -> None:
        super().__init__()
        self.rotary, self.layer_types, self.positions = rotary, layer_types, positions
        self.mended: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        if self.rotary is None:
            return PassResult(model, False)
        seen: set[str] = set()
        for node in model.graph:
            layer = layer_of(node)
            if node.op_type != "RotaryEmbedding" or layer is None:
                continue
            if _in_pairs(self._computed(self.rotary, layer, 8)[0]):
                self._rotate_pairs(node)
            for which, value in enumerate(node.inputs[1:3]):
                gather = value.producer() if value is not None else None
                table = gather.inputs[0] if gather is not None and gather.op_type == "Gather" else None
                if table is None or table.name is None or table.name in seen or table.const_value is None:
                    continue
                seen.add(table.name)
                have = table.const_value.numpy()
                want = _once(self._computed(self.rotary, layer, min(len(have), self.positions))[which])
                if want.shape[1:] != have.shape[1:]:
                    continue  # another layout: left as it is, for the verification to judge
                if len(want) < len(have) or np.abs(want - have.astype(np.float32)).max() > 1e-3:
                    table.const_value = ir.tensor(want.astype(have.dtype), name=table.name)
                    table.shape = ir.Shape(want.shape)
                    self.mended.append(table.name)
        return PassResult(model, bool(self.mended))

    def _rotate_pairs(self, node: ir.Node) -> None:
        if "interleaved" not in node.attributes or not node.attributes["interleaved"].as_int():
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)
            self.mended.append(str(node.name))

    def _computed(self, rotary: torch.nn.Module, layer: int, rows: int) -> list[NDArray[np.float32]]:
        """The module's cos and sin, (rows, width) each."""
        arguments: list[Any] = [torch.zeros(1, rows, 1), torch.arange(rows)[None]]
        if self.layer_types and "layer_type" in inspect.signature(rotary.forward).parameters:
            arguments.append(self.layer_types[layer])
        with torch.no_grad():
            return [np.asarray(part[0].float().numpy(), np.float32) for part in rotary(*arguments)]


def _in_pairs(table: NDArray[np.float32]) -> bool:
    """Whether neighbours turn together. Transformers writes every angle twice: side by side then, else in halves."""
    half = table.shape[1] // 2
    return not np.array_equal(table[:, :half], table[:, half:]) and np.array_equal(table[:, ::2], table[:, 1::2])


def _once(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, width) -> (rows, width / 2): every angle once."""
    return table[:, ::2] if _in_pairs(table) else table[:, : table.shape[1] // 2]
