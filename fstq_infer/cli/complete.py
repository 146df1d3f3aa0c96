"""Shell completion: what may stand for an argument. Called by the shell at each Tab: it never raises, and is quick."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from fstq_infer.errors import FstqError

TARGETS = ("orin-nano", "orin-nx", "agx-orin", "thor", "sm86", "sm120")
PRECISIONS = (
    *("auto", "fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "int4-64", "int4-128", "int4-128-dynamic"),
    *("fp8", "nvfp4"),
)
KEEPS = ("auto", "1.0", "0.5", "0.25", "0.125")


def adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the adapters of the bundle that stands before."""
    from fstq_infer.bundle import Bundle

    # While an option lacks its value, the parser has not come to the arguments; the bundle is the first of them.
    path = ctx.params.get("bundle") or next((word for word in ctx.args if not word.startswith("-")), None)
    try:
        names = list(Bundle.open(path, checksums=False).manifest.adapters) if path is not None else []
    except FstqError:
        names = []
    return _beginning(names, incomplete)


def devices(incomplete: str) -> list[str]:
    """Boards that have a profile."""
    from fstq_infer.device import names

    try:
        return _beginning(names(), incomplete)
    except FstqError:
        return []


def planned(incomplete: str) -> list[str]:
    """What ``fstq plan --device`` takes."""
    return [*devices(incomplete), *_beginning(("all",), incomplete)]


def backends(incomplete: str) -> list[str]:
    """Backends of engines."""
    from fstq_infer.runtime.load import BACKENDS

    return _beginning(BACKENDS, incomplete)


def own_targets(incomplete: str) -> list[str]:
    """GPUs that ``fstq build`` makes engines for elsewhere."""
    return _beginning(("sm86", "sm120"), incomplete)


def targets(incomplete: str) -> list[str]:
    """Devices that ``fstq lint`` stands in for."""
    return _beginning(TARGETS, incomplete)


def precisions(incomplete: str) -> list[str]:
    """Formats of weights by their short names."""
    return _beginning(PRECISIONS, incomplete)


def keeps(incomplete: str) -> list[str]:
    """Usual keep ratios."""
    return _beginning(KEEPS, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
