"""What ``fstq export`` does around the pipeline: progress bars, a summary for people or JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fstq_export.adapters import Wanted
from fstq_export.pipeline import Done, Request
from fstq_export.pipeline import export as run_export
from fstq_export.recipe import Recipe
from fstq_export.report import precision_verdict, verdict
from fstq_export.wanted import Precision
from fstq_infer.terminal import notes, out


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one per step, made as steps report."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=notes, disable=not notes.is_terminal) as shown:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name, total=total)
            shown.update(tasks[name], completed=done, total=total)

        yield report


def export(
    *,
    model: str,
    out: Path,
    calib: Path | None,
    prune_layer: list[int] | None,
    keep: list[float] | None,
    max_quality_drop: float,
    max_prompt: int | None,
    calib_items: int | None,
    dtype: str,
    score: str,
    seed: int,
    sink: int,
    window: int | None,
    revision: str | None,
    force: bool,
    json: bool,
    precision: str | None,
    bits: float | None,
    bytes: int | None,
    target_latency: str | None,
    profile: str | None,
    tune_codes: int | None,
    adapter: list[str],
    adapter_targets: str | None,
    adapter_rank: int | None,
    merge_adapter: Path | None,
) -> None:
    """``fstq export``."""
    recipe = Recipe(prune_layer, keep, max_quality_drop, score, sink, window, seed)
    formats = Precision.parse(precision, bits, bytes, target_latency, profile, tune_codes)
    adapters = Wanted.parse(adapter, adapter_targets, adapter_rank, merge_adapter)
    request = Request(model, out, recipe, calib, calib_items, max_prompt, dtype, force, revision, formats, adapters)
    with bars() as progress:
        done = run_export(request, progress)
    show(done, json)


def adapter_verdict(name: str, found: Mapping[str, Any]) -> str:
    """What was found out about an adapter, in one sentence."""
    logits = found["verification"]["dense"]["logits"]
    said = f"adapter {name}: logits within {logits:.1e} of Transformers"
    again = found.get("calibration")
    if again is None:
        return f"{said}; the quality contract was not measured with it"
    with_probe = "a probe of its own" if again["own_probe"] is not None else "the bundle's probe"
    if again["met"]:
        return f"{said}; the quality contract holds with {with_probe} at keep {again['keeps'][-1]:g}"
    return f"{said}; THE QUALITY CONTRACT BREAKS with it: by default it runs at keep {again['keeps'][-1]:g}"


def show(done: Done, json: bool) -> None:
    """Summary of a finished export."""
    if json:
        size = {"seconds": done.seconds, "peak_rss_bytes": done.peak_rss}
        out.data({"bundle": str(done.path), **size, "report": done.report})
        return
    out.print(verdict(done.report))
    if done.report["precision"] is not None:
        out.print(precision_verdict(done.report["precision"]))
    checked = done.report["verification"]
    pruned = checked["pruned"]
    agrees = f"; pruned within {pruned['logits']:.1e}" if pruned else ""
    steps = f"prefill and {checked['decode_steps']} decode steps"
    out.print(f"verified: logits within {checked['dense']['logits']:.1e} of Transformers over {steps}{agrees}")
    for name, found in done.report["adapters"].items():
        out.print(adapter_verdict(name, found))
    size, memory = done.report["graph"]["bytes"] / 2**20, done.peak_rss / 2**30
    out.print(f"bundle {done.path}: {size:.1f} MiB, {done.seconds:.1f} s, peak memory {memory:.2f} GiB")
    out.print(f"next: fstq run {done.path} 'your prompt'        evidence: {done.path / 'report.html'}")
