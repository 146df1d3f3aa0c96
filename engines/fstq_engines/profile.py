"""What kernels take on this device: each format, for every shape of matrix in a bundle, one token and a prompt.

Kernels are those that an engine gets: a layer as a bundle stores it is lowered by the same pass and optimised by the
same ONNX Runtime, with random codes, which take as long as any. The processor's caches are filled with something else
before each run: a decoder's other weights have passed through them since a kernel's own were last read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fstq_engines.quantized import METADATA, QuantizedLayers, layers
from fstq_infer.atomic import replace_file
from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError, OptionError
from fstq_infer.machine import description
from fstq_infer.quant.formats import CPU_FORMATS, FORMATS, Format
from fstq_infer.quant.latency import Kernel, Profile, Roofline
from fstq_infer.runtime.ort import MODEL, brief, import_onnxruntime, session_options

OPSET, IR_VERSION = 23, 10
FEWEST, MOST, SECONDS = 3, 50, 0.5  # runs of a kernel, and after how many seconds no more are begun
WARM = 2
OTHERS = 256 << 20  # bytes that are read between two runs
LARGEST = 1 << 29  # weights of a matrix that is measured; a model of one must stay below 2 GiB


def check(path: Path, tokens: int) -> None:
    """Raise OptionError for what :func:`write` could not do, before anything takes minutes."""
    if tokens < 1:
        raise OptionError(f"profile-tokens is {tokens}; expected a number of tokens above 0")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OptionError(f"the profile {path} cannot be written: it is a folder, or its folder does not exist")


def write(bundle: Bundle, path: Path, tokens: int, threads: int | None = None) -> Profile:
    """Measure a bundle's shapes, and write the profile; OptionError for a place that cannot be written."""
    check(path, tokens)
    found = measure(shapes(bundle), sorted({1, tokens}), threads, SECONDS)
    try:
        replace_file(path, found.to_toml().encode())
    except OSError as error:
        raise OptionError(f"the profile {path} cannot be written: {error}") from error
    return found


def shapes(bundle: Bundle) -> list[tuple[int, int]]:
    """(outputs, inputs) of all matrices that a bundle's graph multiplies with, each once."""
    graph = ir.load(bundle.file(MODEL)).graph
    found = {layer.weight.shape for layer in layers(graph) if layer.node.op_type != "Gather"}
    for value in graph.initializers.values():
        for node, index in value.uses():
            if node.op_type not in ("MatMul", "Gemm") or index != 1 or len(value.shape or ()) != 2:
                continue
            rows, columns = (int(size) for size in value.shape)  # type: ignore[union-attr, arg-type]
            turned = node.op_type == "MatMul" or not node.attributes.get_int("transB", 0)
            found.add((columns, rows) if turned else (rows, columns))
    return sorted(shape for shape in found if min(shape) > 1 and shape[0] * shape[1] <= LARGEST)


def measure(matrices: Sequence[tuple[int, int]], tokens: Sequence[int], threads: int | None, seconds: float) -> Profile:
    """Medians for all formats; the formats of one shape take turns, so that a slow moment strikes all."""
    kernels: dict[Kernel, float] = {}
    for outputs, inputs in matrices:
        # Four at a time: a model of each format of a large head would be several GiB.
        names = CPU_FORMATS
        for chunk in (names[start : start + 4] for start in range(0, len(names), 4)):
            sessions = {name: _session(FORMATS[name], outputs, inputs, threads) for name in chunk}
            for count in tokens:
                x = np.random.default_rng(0).normal(size=(1, count, inputs)).astype(np.float32)
                times: dict[str, list[float]] = {name: [] for name in sessions}
                for name, took in _turns(sessions, x, seconds):
                    times[name].append(took)
                for name, own in times.items():
                    kernels[outputs, inputs, name, count] = float(np.median(own))
    ort, machine = import_onnxruntime(), description()
    used = session_options(threads).intra_op_num_threads
    return Profile(f"{machine['cpu']}, {used} threads, onnxruntime {ort.__version__}", Roofline.measured(), kernels)


def _turns(sessions: dict[str, Any], x: NDArray[np.float32], seconds: float) -> Iterator[tuple[str, float]]:
    for session in sessions.values():
        for _ in range(WARM):
            session.run(None, {"x": x})
    others = np.zeros(OTHERS // 8)
    others += 1.0  # pages that were never written are one page
    end = time.perf_counter() + seconds * len(sessions)
    for number in range(MOST):
        if number >= FEWEST and time.perf_counter() > end:
            return
        for name, session in sessions.items():
            others.max()
            began = time.perf_counter()
            session.run(None, {"x": x})
            yield name, time.perf_counter() - began


def _session(form: Format, outputs: int, inputs: int, threads: int | None) -> Any:
    model = QuantizedLayers()(layer(form, outputs, inputs)).model
    ort = import_onnxruntime()
    try:
        return ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise EngineError(f"{form.name}, {outputs} x {inputs}, cannot be measured: {brief(error)}") from error


def layer(form: Format, outputs: int, inputs: int) -> ir.Model:
    """One matrix with random codes as a bundle stores it, between ``x`` (batch, tokens, inputs) and ``y``."""
    rng = np.random.default_rng(0)
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "tokens", inputs]))
    graph = ir.Graph([given], [], nodes=[], opset_imports={"": OPSET}, name="layer")

    def constant(name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.initializers[name] = value
        return value

    tape = ir.tape.Tape()
    if form.is_integer:
        low, high = form.levels
        codes = rng.integers(low, high + 1, (outputs, inputs), np.int8)
        scales = rng.uniform(0.01, 0.02, (outputs, form.blocks(inputs))).astype(np.float16)
        stored = constant("w.codes", codes.astype(ml_dtypes.int4) if form.bits == 4 else codes)
        floats = tape.op(
            "Cast", [constant("w.scales", scales if form.block else scales[:, 0])], {"to": int(ir.DataType.FLOAT)}
        )
        layout = {"axis": 1, "block_size": form.block} if form.block else {"axis": 0}
        numbers = tape.op("DequantizeLinear", [stored, floats], layout)
    else:
        kind = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[form.name]
        stored = constant("w", rng.normal(size=(outputs, inputs)).astype(np.float32).astype(kind))
        numbers = tape.op("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
    made = tape.op("MatMul", [given, tape.op("Transpose", [numbers], {"perm": [1, 0]})])
    producer = made.producer()
    if producer is not None:
        producer.metadata_props[METADATA] = form.name
    made.name, made.type = "y", ir.TensorType(ir.DataType.FLOAT)
    made.shape = ir.Shape(["batch", "tokens", outputs])
    graph.extend(tape.nodes)
    graph.outputs.append(made)
    return ir.Model(graph, ir_version=IR_VERSION)
