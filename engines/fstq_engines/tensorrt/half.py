"""Pass: layers compute in half precision, strongly typed. Scores and masks (our own nodes) stay in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from fstq_engines.tensorrt.emit import FLOATS, Emit, propagate_types
from fstq_infer.errors import EngineError

OURS = "fstq/"
LARGEST_HALF = 65504.0


class Half(InPlacePass):
    """source, target: floating-point types; values of ``source`` outside our own nodes become ``target``.

    Raises EngineError for a weight that the target cannot hold.
    """

    def __init__(self, source: ir.DataType, target: ir.DataType) -> None:
        super().__init__()
        self.source, self.target = source, target
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        propagate_types(graph)
        if self.source == self.target:
            return PassResult(model, False)
        for given in graph.inputs:
            if given.dtype == self.source:
                given.type = ir.TensorType(self.target)
        wide: set[ir.Value] = set()  # what our own nodes make
        for node in list(graph):
            ours = (node.name or "").startswith(OURS)
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                if ours and value.dtype == self.target and not value.is_initializer():
                    node.replace_input_with(index, self._cast(graph, node, value, self.source))
                elif not ours and value in wide and value.dtype == self.source:
                    node.replace_input_with(index, self._cast(graph, node, value, self.target))
                elif not ours and value.is_initializer() and value.dtype == self.source:
                    node.replace_input_with(index, self._narrow(graph, value))
            if ours:
                wide.update(node.outputs)
                continue
            if node.op_type == "Cast" and node.attributes["to"].as_int() == int(self.source):
                node.attributes["to"] = ir.AttrInt64("to", int(self.target))
            for made in node.outputs:
                if made.dtype == self.source:
                    made.type = ir.TensorType(self.target)
        self._logits(graph)
        for name in [n for n, v in graph.initializers.items() if not v.uses() and v not in graph.outputs]:
            graph.initializers.pop(name)
        return PassResult(model, True)

    def _cast(self, graph: ir.Graph, before: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """The value in another type, converted once, right after it is made."""
        if (value, kind) not in self._made:
            emit = Emit(graph, f"{OURS}trt/half.{len(self._made)}")
            self._made[value, kind] = emit("Cast", value, to=int(kind))
            producer = value.producer()
            if producer is None:
                graph.insert_before(graph[0], emit.nodes)
            else:
                graph.insert_after(producer, emit.nodes)
        return self._made[value, kind]

    def _narrow(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        if (value, self.target) not in self._made:
            array = value.const_value.numpy() if value.const_value is not None else np.zeros(0, np.float32)
            if self.target == ir.DataType.FLOAT16 and array.size and np.abs(array).max() > LARGEST_HALF:
                raise EngineError(
                    f"{value.name} holds {np.abs(array).max():.3g}, float16 ends at 65504; build with --dtype bfloat16"
                )
            name = f"{value.name}.{self.target.name.lower()}"
            tensor = ir.tensor(array.astype(FLOATS[self.target]), name=name)
            made = ir.Value(name=name, type=ir.TensorType(self.target), shape=ir.Shape(array.shape), const_value=tensor)
            graph.initializers[name] = made
            self._made[value, self.target] = made
        return self._made[value, self.target]

    def _logits(self, graph: ir.Graph) -> None:
        """Logits leave in float32, whatever the layers compute in."""
        for index, value in enumerate(graph.outputs):
            producer = value.producer()
            if value.name == "logits" and value.dtype == self.target and producer is not None:
                emit = Emit(graph, f"{OURS}trt/logits")
                out = emit("Cast", value, to=int(ir.DataType.FLOAT))
                value.name, out.shape = "logits.half", value.shape
                out.name = "logits"
                graph.insert_after(producer, emit.nodes)
                graph.outputs[index] = out
