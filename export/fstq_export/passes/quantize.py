"""Pass: weights in their formats. Codes and scales are stored, standard operators make numbers of them again.

A format with scales becomes ``DequantizeLinear`` over (outputs, inputs) codes: blocks of a row along axis 1, or a scale
for each row along axis 0. ONNX Runtime has no FP4: numbers of nvfp4 are stored as int8, twice their value. A MatMul
reads it transposed, a Gather or a Gemm with transB as it is: one layout for all, which weight-only kernels want too.
Half precision formats become a ``Cast``.

ONNX Runtime fuses (K, N) blocks along axis 0, and rows that a Transpose has turned, with their MatMul to MatMulNBits,
and at its default accuracy level 4 rounds the activations to int8 on the way: differences of 0.04 to 0.1 on logits of
deviation 1. At level 1, which our sessions set, it computes what is written (5e-7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from fstq_export.passes.scope import Emit
from fstq_infer.errors import UnsupportedModelError
from fstq_infer.quant.codes import Quantized

Prints = NDArray[np.uint64]

METADATA = "fstq.format"  # on the operators that read a weight: the format's name, for lowering
READERS = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # operator -> the input that is a weight
CHUNK = 1 << 22  # numbers that are hashed at a time
NARROW = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}


class QuantizeWeights(InPlacePass):
    """Replace weights by their codes. weights: name -> codes. prints: name -> fingerprints of what they were made of.

    A graph's weight is found by its rows, wherever the exporter has put them: renamed, taken apart or in another order.
    ``stored`` counts the weights that were replaced. Raises UnsupportedModelError for a plan's weight that the graph
    does not hold, since the plan's size and damage would be wrong then.
    """

    def __init__(self, weights: Mapping[str, Quantized], prints: Mapping[str, Prints]) -> None:
        super().__init__()
        self.weights, self.prints = weights, prints
        self.stored = 0
        self._rows: dict[int, tuple[str, int]] = {}

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        left = set(self.weights)
        for name, value in list(graph.initializers.items()):
            readers = [(node, index) for node, index in value.uses()]
            if not readers or any(READERS.get(node.op_type) != index for node, index in readers):
                continue
            tensor = value.const_value
            if tensor is None or len(tensor.shape) != 2:
                continue
            turned = _is_transposed(readers[0][0])
            array = tensor.numpy()
            found = self._find(name, array.T if turned else array)
            if found is None:
                continue
            owner, quantized = found
            left.discard(owner)
            if quantized.format.name == "fp32":
                continue
            for node, index in readers:
                node.replace_input_with(index, self._read(graph, name, quantized, node, array.dtype, turned))
                node.metadata_props[METADATA] = quantized.format.name
            graph.initializers.pop(name)
            self.stored += 1
        if left:
            raise UnsupportedModelError(
                f"the graph holds no weight that equals the model's {min(left)!a} ({len(left)} weights of the plan "
                "were not found), so formats cannot be given; export this model without --precision"
            )
        return PassResult(model, bool(self.stored))

    def _find(self, name: str, rows: NDArray[Any]) -> tuple[str, Quantized] | None:
        """(the plan's weight that these (outputs, inputs) are or come from, their codes)."""
        seen = fingerprints(rows)
        own = name.removesuffix("_t").removesuffix(".weight")
        for other in (own, *self.prints) if own in self.prints else self.prints:
            if np.array_equal(self.prints[other], seen):
                return other, self.weights[other]
        if not self._rows:
            for other, known in self.prints.items():
                self._rows |= {row: (other, number) for number, row in enumerate(known.tolist())}
        places = [self._rows[row] for row in seen.tolist() if row in self._rows]
        owners = {owner for owner, _ in places}
        if len(places) < len(seen) or len(owners) != 1:
            return None
        owner = owners.pop()
        return owner, self.weights[owner].rows(np.array([number for _, number in places], np.int64))

    def _read(
        self, graph: ir.Graph, name: str, found: Quantized, reader: ir.Node, dtype: np.dtype[Any], turned: bool
    ) -> ir.Value:
        """The weight's numbers, in the type and layout that ``reader`` expects."""
        emit = Emit(graph, f"{(reader.name or name).rpartition('/')[0]}/{reader.op_type}.{name.rpartition('.')[2]}")
        wanted = int(ir.DataType.from_numpy(dtype))

        def typed(value: ir.Value, have: np.dtype[Any]) -> ir.Value:
            return value if have == dtype else emit("Cast", value, to=wanted)

        form = found.format
        if found.scales is None:
            kind = np.dtype(NARROW[form.name])
            codes = found.codes.view(kind) if form.name == "bf16" else found.codes.astype(kind)
            out = typed(emit.weight(f"{name}.{form.name}", np.ascontiguousarray(codes)), kind)
        else:
            kind = np.dtype(ml_dtypes.int4 if form.is_integer and form.bits == 4 else np.int8)
            # Four-bit numbers lie in bytes here too: a view, since a copy of all codes is as large as the codes.
            numbers = np.ascontiguousarray(found.codes)
            numbers = numbers.view(kind) if numbers.dtype == np.int8 else numbers.astype(ml_dtypes.float8_e4m3fn)
            codes = emit.weight(f"{name}.codes", numbers)
            stored = found.scales if form.block else found.scales[:, 0]
            scales = typed(emit.weight(f"{name}.scales", np.ascontiguousarray(stored)), np.dtype(np.float16))
            layout = {"axis": 1, "block_size": form.block} if form.block else {"axis": 0}
            out = emit("DequantizeLinear", codes, scales, **layout)
        for node in emit.nodes:
            node.metadata_props[METADATA] = form.name
        rows = found.codes.shape
        out.shape, out.type = ir.Shape(rows), ir.TensorType(ir.DataType(wanted))
        if turned:
            out = emit("Transpose", out, perm=[1, 0])
            out.shape, out.type = ir.Shape(rows[::-1]), ir.TensorType(ir.DataType(wanted))
        graph.insert_before(reader, emit.nodes)
        return out


def _is_transposed(reader: ir.Node) -> bool:
    """Whether a reader wants (inputs, outputs)."""
    if reader.op_type == "Gemm":
        return "transB" not in reader.attributes or not reader.attributes["transB"].as_int()
    return reader.op_type == "MatMul"


def fingerprints(rows: NDArray[Any]) -> Prints:
    """(rows,) hashes of a matrix's rows as they are stored; with the number of columns, so that widths do not mix."""
    columns = rows.shape[1]
    kind = np.dtype(f"u{rows.dtype.itemsize}")
    odd = np.random.default_rng(columns).integers(0, 2**64, columns, np.uint64) | np.uint64(1)
    step = max(1, CHUNK // columns)
    found = [
        (np.ascontiguousarray(rows[start : start + step]).view(kind).astype(np.uint64) * odd).sum(1, dtype=np.uint64)
        for start in range(0, len(rows), step)
    ]
    return np.concatenate(found) * np.uint64(2 * columns + 1)
