"""Does a kernel compute with a weight's codes what it should, on this machine? Each layer alone, against NumPy.

A layer whose inputs are rounded cannot be compared with the bundle's closely, but with the same sums over inputs that
were rounded already: nothing is rounded twice then, and what is left is the order of additions. So wrongly packed codes
show, and products of bytes that overflow, as they do in some kernels for processors without VNNI.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fstq_engines.codes import LEVELS, MICROSOFT, Array, Weight
from fstq_infer.runtime.ort import import_onnxruntime, session_options

OPSET, IR_VERSION = 23, 10
TOKENS, IDS = 3, 16
AT_ONCE = 1 << 25  # codes in one model: a large table is looked at in parts


def difference(weight: Weight, way: str) -> float:
    """Largest difference in units of a token's deviation; infinite where the kernel does not run."""
    outputs, columns = weight.shape
    step = max(1, AT_ONCE // columns)
    return max(_part(weight, way, slice(start, start + step)) for start in range(0, outputs, step))


def _part(weight: Weight, way: str, rows: slice) -> float:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, MICROSOFT: 1}, name="layer")
    part = weight.part(graph, rows)
    outputs, columns = part.shape
    rng = np.random.default_rng(outputs)
    given = rng.integers(0, outputs, IDS) if way == "rows" else _rounded(rng, columns, part.inputs(way == "dynamic"))
    kind = ir.DataType.INT64 if way == "rows" else ir.DataType.FLOAT
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["rows"] if way == "rows" else ["rows", columns]))
    tape = ir.tape.Tape()
    made = {
        "rows": lambda: part.rows(tape, x),
        "dynamic": lambda: part.dynamic(tape, x, {}),
        "blocks": lambda: part.blocks(tape, x),
    }[way]()
    made.name, made.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.extend(tape.nodes)
    graph.inputs.append(x)
    graph.outputs.append(made)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    numbers = part.numbers()
    expected = numbers[given] if way == "rows" else given @ numbers.T
    try:
        session = import_onnxruntime().InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": given})[0]
    except Exception:  # ONNX Runtime's exceptions have no common base; a kernel that is not there is not used
        return float("inf")
    apart = float((np.abs(found - expected).max(-1) / np.maximum(expected.std(-1), 1e-30)).max())
    return apart if np.isfinite(apart) else float("inf")


def _rounded(rng: np.random.Generator, columns: int, block: int) -> Array:
    """(tokens, columns) of very different sizes, each block whole multiples of a 127th of its largest number."""
    codes = rng.integers(-int(LEVELS), int(LEVELS) + 1, (TOKENS, columns)).astype(np.float32)
    codes[:, ::block] = LEVELS
    sizes = np.float32(10.0) ** np.arange(TOKENS, dtype=np.float32)[:, None]
    return np.asarray(codes * sizes / np.float32(64), np.float32)
