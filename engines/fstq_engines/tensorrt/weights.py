"""Pass: codes behind DequantizeLinear as TensorRT takes them: symmetric, weight only, scales of the type that is computed in.

int8-dynamic becomes weight-only int8: TensorRT rounds activations with constant scales only, and a bundle holds none.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from fstq_engines.tensorrt.capabilities import Capabilities


class Weights(InPlacePass):
    """``quantized`` counts the operators with integer codes."""

    def __init__(self, capable: Capabilities) -> None:
        super().__init__()
        self.capable, self.quantized = capable, 0

    def call(self, model: ir.Model) -> PassResult:
        for node in model.graph:
            if node.op_type == "DequantizeLinear":
                self.quantized += 1
                if len(node.inputs) > 2 and node.inputs[2] is not None:
                    raise PreconditionError(f"{node.name} has a zero point; TensorRT takes symmetric weights only")
        return PassResult(model, False)
