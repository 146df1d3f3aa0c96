"""What ``fstq adapter add``, ``list`` and ``remove`` do and print."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from fstq_infer.adapters import store
from fstq_infer.adapters.info import check_name
from fstq_infer.bundle import Bundle
from fstq_infer.terminal import out


def add(path: Path, given: str, *, name: str | None, force: bool, json: bool) -> None:
    """``fstq adapter add``."""
    chosen, folder = (check_name(name), Path(given)) if name is not None else store.named(given)
    bundle = store.add(path, chosen, folder, force=force)
    if json:
        out.data({"adapter": chosen, **bundle.manifest.adapters[chosen].to_json()})
        return
    out.print(f"added {chosen}: rank {bundle.manifest.adapters[chosen].rank}; built engines stay valid")
    if bundle.manifest.stages:
        out.print("the quality contract was not measured with it; 'fstq export --adapter' does that")


def show(path: Path, *, json: bool) -> None:
    """``fstq adapter list``."""
    bundle = Bundle.open(path, checksums=False)
    found = bundle.manifest.adapters
    if json:
        out.data({name: one.to_json() for name, one in found.items()})
        return
    if bundle.manifest.lora is None:
        out.print("this bundle takes no adapters; export the model again with --adapter or --adapter-targets")
        return
    room = f"{len(bundle.manifest.lora.linears)} layers take adapters up to rank {bundle.manifest.lora.rank}"
    if not found:
        out.print(f"{room}; there are none yet: 'fstq adapter add' puts one in")
        return
    table = Table(title=room)
    for column in ("name", "rank", "KiB", "trained on", "contract"):
        table.add_column(column, justify="right" if column in ("rank", "KiB") else "left")
    for name, one in found.items():
        contract = one.pruning.contract if one.pruning is not None else None
        kept = "not measured" if contract is None else "met" if contract.met else "not met: dense"
        own = ", own probe" if one.probe else ""
        table.add_row(name, str(one.rank), f"{one.bytes / 1024:.0f}", one.base, kept + own)
    out.print(table)


def remove(path: Path, name: str, *, json: bool) -> None:
    """``fstq adapter remove``."""
    bundle = store.remove(path, name)
    if json:
        out.data({"removed": name, "adapters": sorted(bundle.manifest.adapters)})
        return
    out.print(f"removed {name}; built engines stay valid")
