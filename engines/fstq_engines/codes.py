"""A weight of integer codes in a graph, and the operators of ONNX Runtime's CPU kernels that compute with it.

- int4 in blocks, and int8: MatMulNBits, inputs rounded to int8 in blocks (accuracy level 4);
- int8 with dynamic inputs: a scale for each token and MatMulIntegerToFloat, the fastest there is for many tokens;
- int4 for few tokens and int8 for many: the first two, of which a call takes one; codes are held twice;
- embeddings: rows are looked up as codes.

Microseconds on one thread of a core with VNNI that other work shared (least of several), onnxruntime 1.32:

| | 896 x 4,864: 1 token | 1,024 | 896 x 896: 1 | 1,024 |
|---|---|---|---|---|
| DynamicQuantizeLinear (one scale for all tokens), MatMulInteger | 291 | 91,000 | 23 | 24,500 |
| scale for each token, QuantizeLinear along axis 0, MatMulIntegerToFloat | 297 | 97,000 | 29 | 20,900 |
| scale for each token, Div, QuantizeLinear with scale 1 (taken) | 305 | 99,000 | 28 | 25,000 |
| scale for each token, Div, Round, Cast | 345 | 112,000 | 29 | 25,200 |
| the same with signed inputs | 8,143 | 1,053,000 | 508 | 286,000 |
| MatMulNBits, 8 bits, level 4 | 176 | 191,000 | 21 | 45,000 |
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fstq_engines.graph import initializer

MICROSOFT = "com.microsoft"
BYTE_BLOCK = 128  # inputs that share a scale in an int8 layer: its kernel has no scale for a whole row
INT8_INPUTS = 4  # MatMulNBits' accuracy level
MIDDLE, LEVELS, TINY = 128, 127.0, 1e-30  # of an input rounded to uint8: its zero, its largest code; the least largest
Array = NDArray[Any]
Rounded = dict["ir.Value | None", tuple[ir.Value, ir.Value]]  # an input -> its codes, and its tokens' scales


class Weight:
    """One matrix, codes (outputs, inputs) and scales (outputs,) or (outputs, blocks of ``block`` inputs)."""

    def __init__(
        self,
        graph: ir.Graph,
        name: str,
        codes: ir.TensorProtocol,
        scales: ir.TensorProtocol,
        block: int,
        rows: slice = slice(None),
    ) -> None:
        """graph: where its operators' constants go. rows: outputs that count. Nothing is read yet."""
        self.graph, self.name, self.block = graph, name, block
        self._codes, self._scales, self._rows = codes, scales, rows
        self.bits = 4 if codes.dtype == ir.DataType.INT4 else 8

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, columns = (int(size) for size in self._codes.shape)  # type: ignore[arg-type]
        return len(range(outputs)[self._rows]), columns

    @property
    def stored(self) -> int:
        """Bytes of codes and scales in the bundle."""
        return int(self._codes.nbytes + self._scales.nbytes)

    @cached_property
    def codes(self) -> Array:
        """(outputs, inputs)."""
        return self._codes.numpy()[self._rows]

    @cached_property
    def scales(self) -> Array:
        """(outputs,) or (outputs, blocks), float32."""
        return self._scales.numpy()[self._rows].astype(np.float32)

    def part(self, graph: ir.Graph, rows: slice) -> Weight:
        """Some of its outputs, for another graph."""
        return Weight(graph, self.name, self._codes, self._scales, self.block, rows)

    def numbers(self) -> Array:
        """(outputs, inputs) float32."""
        scales = self.scales.reshape(len(self.codes), -1)
        spread = np.repeat(scales, self.block or self.shape[1], axis=1)[:, : self.shape[1]]
        return np.asarray(self.codes.astype(np.float32) * spread, np.float32)

    def inputs(self, dynamic: bool) -> int:
        """Neighbours among a token's inputs that are rounded with one scale."""
        return self.shape[1] if dynamic else self.block or BYTE_BLOCK

    def widened(self) -> Weight:
        """The same matrix in int8 codes with a scale for each output.

        Rounding once more adds little: a step is at most an 18th of an int4 block's with the largest scale of its row.
        """
        numbers = self.numbers()
        scales = np.maximum(np.abs(numbers).max(1), TINY).astype(np.float32) / np.float32(LEVELS)
        codes = np.rint(numbers / scales[:, None]).astype(np.int8)
        return Weight(self.graph, f"{self.name}.wide", ir.tensor(codes), ir.tensor(scales), 0)

    def _constant(self, what: str, array: Array) -> ir.Value:
        return initializer(self.graph, f"{self.name}.{what}", array)

    def rows(self, tape: ir.tape.Tape, ids: ir.Value | None) -> ir.Value:
        """Gather: rows as numbers."""
        if self.bits == 4:
            inputs = [self._constant("rows", self.codes), ids, self._constant("row_scales", self.scales)]
            attributes = {"block_size": self.block, "gather_axis": 0, "quantize_axis": 1, "bits": 4}
            return tape.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
        found = tape.op("Gather", [self._constant("rows", self.codes), ids], {"axis": 0})
        scales = self._constant("row_scales", self.scales.reshape(-1, 1))
        own = tape.op("Gather", [scales, ids], {"axis": 0})
        return tape.op("Mul", [tape.op("Cast", [found], {"to": int(ir.DataType.FLOAT)}), own])

    def dynamic(self, tape: ir.tape.Tape, inputs: ir.Value | None, rounded: Rounded) -> ir.Value:
        """Each token's inputs rounded to 8 bits around 128, once for all layers that read them."""
        if inputs not in rounded:
            rounded[inputs] = self._round(tape, inputs)
        codes, scales = rounded[inputs]
        weight = self._constant("columns", np.ascontiguousarray(self.codes.T))
        column_scales = self._constant("column_scales", self.scales.reshape(-1))
        one, middle = self._shared("one", np.float32(1)), self._shared("middle", np.uint8(MIDDLE))
        product = tape.op("MatMulIntegerToFloat", [codes, weight, one, column_scales, middle], domain=MICROSOFT)
        return tape.op("Mul", [product, scales])

    def _round(self, tape: ir.tape.Tape, inputs: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        axis = self._shared("last", np.array([-1], np.int64))
        high = tape.op("ReduceMax", [inputs, axis], {"keepdims": 1})
        low = tape.op("Neg", [tape.op("ReduceMin", [inputs, axis], {"keepdims": 1})])
        largest = tape.op("Max", [high, low, self._shared("tiny", np.float32(TINY))])
        scales = tape.op("Div", [largest, self._shared("levels", np.float32(LEVELS))])
        whole = tape.op("Div", [inputs, scales])
        middle = self._shared("middle", np.uint8(MIDDLE))
        return tape.op("QuantizeLinear", [whole, self._shared("one", np.float32(1)), middle]), scales

    def _shared(self, name: str, number: Any) -> ir.Value:
        return initializer(self.graph, f"fstq/rounding/{name}", np.asarray(number))

    def blocks(self, tape: ir.tape.Tape, inputs: ir.Value | None) -> ir.Value:
        """MatMulNBits: codes packed (outputs, blocks, bytes), their zero in the middle."""
        outputs, columns = self.codes.shape
        block = self.inputs(dynamic=False)
        count = -(-columns // block)
        codes = np.pad(self.codes.astype(np.int8), ((0, 0), (0, count * block - columns)))
        packed = (codes.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8).reshape(outputs, count, block)
        if self.bits == 4:
            packed = packed[..., ::2] | packed[..., 1::2] << 4
        scales = self.scales if self.scales.size == outputs * count else np.repeat(self.scales.reshape(-1, 1), count, 1)
        attributes = {"K": columns, "N": outputs, "bits": self.bits, "block_size": block, "accuracy_level": INT8_INPUTS}
        constants = [
            self._constant("packed", np.ascontiguousarray(packed)),
            self._constant("scales", scales.reshape(-1)),
        ]
        return tape.op("MatMulNBits", [inputs, *constants], attributes, domain=MICROSOFT)

    def bytes(self, how: str) -> int:
        """What one of the ways above stores."""
        outputs, columns = self.shape
        if how == "either":
            return self.bytes("blocks") + outputs * (columns + 4)
        block = self.inputs(how == "dynamic")
        count = -(-columns // block)
        if how == "blocks":
            return outputs * count * (block * self.bits // 8 + 4)
        return outputs * columns * self.bits // 8 + 4 * outputs * (-(-columns // self.block) if self.block else 1)
