"""Pass: rotary tables as Transformers computes them. Mends exporters that read nested rope parameters wrongly (Gemma 3)."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass, PassResult

from fstq_export.passes.scope import layer_of


class RotaryTables(InPlacePass):
    """Replace cos/sin tables that differ from the model's own rotary module.

    rotary: the module, called as ``rotary(x, position_ids[, layer_type])``. layer_types: per layer, or None.
    """

    def __init__(self, rotary: torch.nn.Module | None, layer_types: list[str] | None) -> None:
        super().__init__()
        self.rotary, self.layer_types = rotary, layer_types
        self.replaced: list[str] = []

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        if self.rotary is None:
            return PassResult(model, False)
        seen: set[str] = set()
        for node in graph:
            layer = layer_of(node)
            if node.op_type != "RotaryEmbedding" or layer is None:
                continue
            for which, value in enumerate(node.inputs[1:3]):
                gather = value.producer() if value is not None else None
                table = gather.inputs[0] if gather is not None and gather.op_type == "Gather" else None
                if table is None or table.name is None or table.name in seen or table.const_value is None:
                    continue
                seen.add(table.name)
                self._mend(table, which, layer)
        return PassResult(model, bool(self.replaced))

    def _mend(self, table: ir.Value, which: int, layer: int) -> None:
        have = table.const_value.numpy()  # type: ignore[union-attr]
        rows, half = have.shape
        positions = torch.arange(rows)[None]
        arguments: list[Any] = [torch.zeros(1, rows, 1), positions]
        if self.layer_types and "layer_type" in inspect.signature(self.rotary.forward).parameters:  # type: ignore[union-attr]
            arguments.append(self.layer_types[layer])
        with torch.no_grad():
            want = self.rotary(*arguments)[which][0, :, :half].float().numpy()  # type: ignore[misc]
        if want.shape == have.shape and np.abs(want - have.astype(np.float32)).max() > 1e-3:
            table.const_value = ir.tensor(want.astype(have.dtype), name=table.name)
            self.replaced.append(str(table.name))
