"""``fstq lint``: would this bundle build on that device? Lowered, parsed and built with TensorRT-RTX, without a GPU.

The graph is the one that the device's own TensorRT would be given. An SM 86 stands in for an Orin, an SM 120 for a
Thor.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fstq_engines.tensorrt import build, module
from fstq_infer.bundle import Bundle
from fstq_infer.machine import peak_rss
from fstq_infer.runtime.trt import PLAN
from fstq_infer.terminal import notes, out

# What a device's JetPack brings: the graph is lowered for it. Others get what TensorRT-RTX itself takes.
JETPACK = {"orin-nano": "10.3", "orin-nx": "10.3", "agx-orin": "10.3", "thor": "10.13"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """A bundle that builds. row: of the capability table. seconds: of lowering and building; cpu_seconds: of CPU.

    plan_bytes, peak_rss_bytes: the plan's size; memory of this process.
    """

    bundle: str
    target: str
    tensorrt: str
    built_with: str
    row: str
    seconds: float
    cpu_seconds: float
    plan_bytes: int
    peak_rss_bytes: int
    details: Mapping[str, Any]


def lint(
    bundle: Bundle,
    target: str,
    version: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Build for ``target`` and throw the plan away. version: of the device's TensorRT; default: its JetPack's.

    Raises EngineError with what stands in the way, OptionError for an unknown target.
    """
    module.target(target)
    made = build.plan(bundle, "tensorrt-rtx", {**(options or {}), "target": target})
    given = version or JETPACK.get(target)
    if given is not None:
        made = replace(made, row_version=given)
    started, used = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="fstq-lint-") as folder:
        details = build.compile_into(made, Path(folder), progress or _log.info)
        size = (Path(folder) / PLAN).stat().st_size
    return Report(
        bundle=str(bundle.path),
        target=target,
        tensorrt=given or f"{made.trt.product} {made.trt.version}",
        built_with=f"{made.trt.product} {made.trt.version} for SM {details['built_for_sm']}",
        row=details["row"],
        seconds=round(time.monotonic() - started, 2),
        cpu_seconds=round(time.process_time() - used, 2),
        plan_bytes=size,
        peak_rss_bytes=peak_rss(),
        details=details,
    )


def command(path: Path, *, target: str, version: str | None, options: Mapping[str, Any], json: bool) -> None:
    """What ``fstq lint`` prints."""
    bundle = Bundle.open(path)
    with notes.status(f"building for {target}") as status:
        report = lint(bundle, target, version, options, lambda text: status.update(text))
    if json:
        out.data(asdict(report))
        return
    out.print(f"{path} builds for {target}, as TensorRT {report.tensorrt} takes it ({report.row})")
    out.print(
        f"{report.built_with}: {report.seconds:.1f} s ({report.cpu_seconds:.1f} s of CPU), plan "
        f"{report.plan_bytes / 2**20:,.0f} MiB, peak memory {report.peak_rss_bytes / 2**30:.2f} GiB; it was not run"
    )
