"""A node that chooses between two ways of computing the same at run time. Knows onnx-ir, no backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

Way = Callable[["ir.tape.Tape"], Sequence[ir.Value]]


def either(tape: ir.tape.Tape, condition: ir.Value, name: str, then: Way, otherwise: Way) -> Sequence[ir.Value]:
    """Outputs of ``then`` where the condition holds, else those of ``otherwise``; as many of both.

    The ways may read any value around them. name: of the node, unique in its graph; names within the branches come
    from it, since a name in a branch must not be one of the graph around it.
    """
    branches = {}
    for branch, way in (("then_branch", then), ("else_branch", otherwise)):
        inner = ir.tape.Tape()
        outputs = list(way(inner))
        for number, node in enumerate(inner.nodes):
            node.name = f"{name}/{branch}/{number}"
            for place, value in enumerate(node.outputs):
                value.name = f"{node.name}/{place}"
        branches[branch] = ir.Graph([], outputs, nodes=inner.nodes, name=f"{name}/{branch}")
    made = len(branches["then_branch"].outputs)
    return tape.op_multi_out("If", [condition], branches, num_outputs=made, name=name)
