"""Markdown and plots of a benchmark's JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Columns = tuple[tuple[str, Callable[[Row, Row | None], str]], ...]  # name, cell of a row and of keep 1's
COLUMNS: Columns = (
    ("prompt", lambda row, dense: str(row["prompt"])),
    ("keep", lambda row, dense: f"{row['keep']:g}"),
    ("kept", lambda row, dense: str(row["kept"])),
    ("TTFT ms", lambda row, dense: f"{1e3 * row['ttft_s']:.1f}"),
    ("roofline", lambda row, dense: _of(row["roofline"], "ttft_s", 1e3, ".1f")),
    ("prefill tok/s", lambda row, dense: f"{row['prefill_tokens_per_s']:.0f}"),
    ("decode tok/s", lambda row, dense: f"{row['decode_tokens_per_s']:.1f}"),
    ("roofline", lambda row, dense: _of(row["roofline"], "decode_tokens_per_s", 1, ".1f")),
    ("end to end s", lambda row, dense: f"{row['total_s']:.3f}"),
    ("speed-up", lambda row, dense: "-" if dense is None else f"{dense['total_s'] / row['total_s']:.2f}x"),
    ("KV MiB", lambda row, dense: f"{row['kv_bytes'] / 2**20:.2f}"),
)
POWER_COLUMNS: Columns = (
    ("prompt", lambda row, dense: str(row["prompt"])),
    ("keep", lambda row, dense: f"{row['keep']:g}"),
    ("prefill W", lambda row, dense: _watts(row, "prefill")),
    ("mJ/token", lambda row, dense: _joules(row, "prefill")),
    ("decode W", lambda row, dense: _watts(row, "decode")),
    ("mJ/token", lambda row, dense: _joules(row, "decode")),
    ("rails while decoding, W", lambda row, dense: _rails(row)),
    ("memory MB", lambda row, dense: _or_dash(row.get("memory_mb"), ".0f")),
    ("hottest C", lambda row, dense: _or_dash(row.get("hottest_c"), ".0f")),
)


def markdown(content: Mapping[str, Any]) -> str:
    """A page: what it ran on, times beside the roofline, power, notes."""
    found, plan = content["device"], content["plan"]
    rows = content["rows"]
    lines = [f"# {content['bundle']} on {(found['title'] or found['jetson']) if found['jetson'] else 'a CPU'}", ""]
    if found["jetson"]:
        clocks = f"{found['gpu_mhz'][0]:.0f} to {found['gpu_mhz'][1]:.0f} MHz" if found["gpu_mhz"] else "not known"
        locked = {True: "locked", False: "**not locked**", None: "not known"}[found["clocks_locked"]]
        lines += [
            f"- {found['jetson']}; Jetson Linux {found['l4t']}, JetPack {found['jetpack']}, "
            f"CUDA {found['cuda'] or 'absent'}, TensorRT {found['tensorrt'] or 'not importable'}",
            f"- power mode {found['power_mode']}, GPU clock {clocks}, {locked}; power from "
            f"{content['power_source'] or 'nothing'}",
        ]
    else:
        lines.append(f"- No Jetson: {found['system']}, on the CPU; no power was measured.")
    engine = content["engine"]
    lines += [
        f"- {content['tool']}, backend {engine['backend']}, provider {engine['provider']}, peak resident memory "
        f"{engine['peak_rss'] / 2**20:.0f} MiB",
        f"- medians of {plan['repeats']} interleaved rounds after a warm-up, {plan['new_tokens']} new tokens",
    ]
    if found["roofline_mode"]:
        lines.append(f"- roofline: what `fstq plan` predicts for {found['title']} in mode {found['roofline_mode']}")
    lines += ["", *_table(COLUMNS, rows)]
    if any(row["power"] for row in rows):
        lines += ["", "Power of the module, in passes of their own:", "", *_table(POWER_COLUMNS, rows)]
    if content["notes"]:
        lines += ["", *(f"- {note}" for note in content["notes"])]
    if found["warnings"]:
        lines += ["", "`fstq doctor` warned of:", ""]
        lines += [f"- {one['check']}: {one['found']}" for one in found["warnings"]]
    return "\n".join(lines) + "\n"


def plot(content: Mapping[str, Any], out: Path) -> bool:
    """Time to first token and decode speed over prompt length as benchmark.svg; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = content["rows"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for keep in dict.fromkeys(row["keep"] for row in rows):
        chosen = [row for row in rows if row["keep"] == keep]
        prompts = [row["prompt"] for row in chosen]
        label = "dense" if keep == 1 else f"keep {100 * keep:.0f} %"
        for axis, key, factor in ((axes[0], "ttft_s", 1e3), (axes[1], "decode_tokens_per_s", 1)):
            (line,) = axis.plot(prompts, [factor * row[key] for row in chosen], marker="o", label=label)
            if all(row["roofline"] for row in chosen):
                values = [factor * row["roofline"][key] for row in chosen]
                axis.plot(prompts, values, linestyle=":", color=line.get_color())
    for axis, title in zip(axes, ("time to first token, ms", "decode, tokens/s"), strict=True):
        axis.set(xlabel="prompt, tokens", title=title, ylim=(0, None))
        axis.legend(title="dotted: roofline" if rows and rows[0]["roofline"] else None)
    figure.tight_layout()
    figure.savefig(out / "benchmark.svg")
    pyplot.close(figure)
    return True


def _table(columns: Columns, rows: list[Row]) -> list[str]:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        dense = next((other for other in rows if other["prompt"] == row["prompt"] and other["keep"] == 1), None)
        lines.append("| " + " | ".join(cell(row, dense) for _, cell in columns) + " |")
    return lines


def _of(found: Row | None, key: str, factor: float, form: str) -> str:
    return "-" if found is None else format(factor * found[key], form)


def _phase(row: Row, phase: str) -> Row | None:
    return row["power"][phase] if row["power"] else None


def _watts(row: Row, phase: str) -> str:
    found = _phase(row, phase)
    return _or_dash(found["watts"].get("total") if found else None, ".2f")


def _joules(row: Row, phase: str) -> str:
    found = _phase(row, phase)
    return "-" if found is None or found["joules_per_token"] is None else f"{1e3 * found['joules_per_token']:.2f}"


def _rails(row: Row) -> str:
    found = _phase(row, "decode")
    if found is None:
        return "-"
    return ", ".join(f"{name} {watts:.2f}" for name, watts in found["watts"].items() if name != "total")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
