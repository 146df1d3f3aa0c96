"""A bundle whose graph has inputs for adapters and for probes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from fstq_export import decoder, linears, source
from fstq_export.passes.pruning import PruneStage

from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.bundle import Bundle
from tests.conftest import write_bundle


def adapted_bundle(model: Path, out: Path, stages: Sequence[PruneStage], rank: int = 8, **described: Any) -> Bundle:
    """All linear layers of a model take adapters, which may bring probes for all stages."""
    resolved, made = source.resolve(str(model)), []

    def ports(graph: ir.Graph) -> LoraPorts:
        probes = {n: tuple(v.shape.numpy()) for n, v in graph.initializers.items() if n.startswith("fstq.probe.")}
        made.append(LoraPorts(rank, tuple(linears.find(resolved, graph, "float32").values()), probes))
        return made[0]

    graph = decoder.build_graph(resolved, "float32", stages, None, None, ports)
    out.mkdir(parents=True, exist_ok=True)
    decoder.save(graph, out)
    return write_bundle(out / "adapted.bundle", out, tuple(s.stage for s in stages), made[0], **described)
