"""From bench/inference.py's measurements to results/inference.json, docs/performance.md's tables and its picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, target, write
from fstq_export.plots import BEST, INK, MUTED, PROBE
from markupsafe import escape

DOCS = RESULTS.parents[1] / "docs"
MIXED = ("w8", "w8h4", "w4", "w4+8")  # our plans, see PLANS in artefacts.py
BEGIN, END = "<!-- written by bench/inference.py: begin -->", "<!-- end -->"
MIB = 1 << 20
LABEL, WIDTH, BAR, GAP, EDGE = 190, 460, 13, 6, 14  # pixels of the picture
Run = Mapping[str, Any]
Row = Mapping[str, Any]


def report(folder: Path, docs: Path | None = DOCS) -> None:
    """Print every measurement in ``folder``, and write all three; not of the tiny shape, and not without ``docs``."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    runs.sort(key=lambda run: (run["shape"], run["prompt"]))
    for run in runs:
        print(f"\n{heading(run)}\n\n{table(run)}")
    runs = [run for run in runs if run["shape"] != "tiny"]
    if not runs or docs is None:
        return
    rows = [
        {"shape": run["shape"], "prompt": run["prompt"], "new": run["new"], "stream": run["stream"], **row}
        for run in runs
        for row in run["rows"]
    ]
    write("inference", "python bench/inference.py --peers PYTHON", rows, targets(runs))
    page = docs / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    parts = ["![Seconds for a whole answer](images/inference.svg)"]
    parts += [f"### {heading(run)}\n\n{table(run)}" for run in runs]
    tables = "\n\n".join(parts)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    (docs / "images" / "inference.svg").write_text(picture(runs), encoding="utf-8")
    print(f"written: {page} and {docs / 'images' / 'inference.svg'}")


def heading(run: Run) -> str:
    """What was run."""
    speed = bandwidth(run) / 1e9
    return f"{run['shape']}, prompt {run['prompt']} + {run['new']} new tokens, memory {speed:.1f} GB/s"


def bandwidth(run: Run) -> float:
    """Bytes per second: the best of copy, triad and read, medians over the rounds."""
    return float(max(run["stream"].values()))


def share(run: Run, row: Row) -> float:
    """Of memory bandwidth that decoding makes use of: what a token has to read, over the time it takes."""
    needed = row["read_bytes"] + row["kv_bytes"]
    return float(needed / (row["decode_ms"] / 1e3) / bandwidth(run))


def measured(run: Run) -> dict[str, Row]:
    """Rows with figures, by contender."""
    return {row["contender"]: row for row in run["rows"] if "total_s" in row and "ttft_s" in row}


def fastest_peer(run: Run) -> Row | None:
    """By the time for the whole answer."""
    peers = [row for row in measured(run).values() if row["peer"]]
    return min(peers, key=lambda row: row["total_s"]) if peers else None


def mixed(run: Run, how: str) -> Row | None:
    """Our fastest row in mixed precision; how: "dense" or "keep 25 %"."""
    rows = measured(run)
    found = [rows[name] for name in (f"fstq {plan} {how}" for plan in MIXED) if name in rows]
    return min(found, key=lambda row: row["total_s"]) if found else None


def table(run: Run) -> str:
    """Markdown; contenders that were not measured stay, with the reason."""
    peer = fastest_peer(run)
    lines = [
        "| | first token, s | ms per token | whole answer, s | times as fast as the fastest peer | peak RSS, MiB "
        "| weights + KV, MiB | KV, MiB | share of bandwidth | same logits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        if "ttft_s" not in row:
            lines.append(f"| {row['contender']} | {_why(row)} |" + " |" * 8)
            continue
        ahead = f"{peer['total_s'] / row['total_s']:.2f}" if peer else ""
        mark = "**" if row is peer else ""
        agrees = f"{row['agreement']:.3f}" if "agreement" in row and "keep" not in row["contender"] else ""
        lines.append(
            f"| {mark}{row['contender']}{mark} | {row['ttft_s']:.3f} | {row['decode_ms']:.1f} | {row['total_s']:.2f} "
            f"| {ahead} | {row['peak_rss'] / MIB:.0f} | {(row['weights_bytes'] + row['kv_bytes']) / MIB:.0f} "
            f"| {row['kv_bytes'] / MIB:.1f} | {share(run, row) * 100:.0f} % | {agrees} |"
        )
    return "\n".join(lines)


def _why(row: Row) -> str:
    text = f"skipped: {row['skipped']}" if "skipped" in row else f"failed: {row.get('error')}"
    return " ".join(text.split()).replace("|", "/")[:160]


def targets(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Figures that can be told from what was measured, beside what was asked for."""
    cases = {(run["shape"], run["prompt"]): run for run in runs}
    found: dict[str, dict[str, Any]] = {}
    if run := cases.get(("0.5B", 1024)):
        rows, peer, name = measured(run), fastest_peer(run), "0.5B, prompt 1024"
        dense, pruned, full = mixed(run, "dense"), mixed(run, "keep 25 %"), rows.get("fstq fp32 dense")
        if pruned and full:
            found[f"{name}: {pruned['contender']} over our dense fp32, whole answer"] = target(
                full["total_s"] / pruned["total_s"], 4.0
            )
        for row, wanted in ((pruned, 3.0), (dense, 1.5)):
            if row and peer:
                found[f"{name}: {row['contender']} over the fastest peer, whole answer"] = target(
                    peer["total_s"] / row["total_s"], wanted
                )
        half = rows.get("transformers bf16")
        if dense and half:
            found[f"{name}: {dense['contender']} over Hugging Face bf16, first token"] = target(
                half["ttft_s"] / dense["ttft_s"], 1.0
            )
        for row in filter(None, (dense, full)):
            part = share(run, row)
            found[f"{name}: {row['contender']}, decode as a share of the bandwidth bound"] = target(part, 0.7)
            found[f"{name}: {row['contender']}, peak RSS over weights + KV"] = target(
                row["peak_rss"] / (row["weights_bytes"] + row["kv_bytes"]), 1.25, at_least=False
            )
    for shape in dict.fromkeys(run["shape"] for run in runs):
        if (shape, 1024) in cases and (shape, 4096) in cases:
            found |= _growth(shape, cases[shape, 1024], cases[shape, 4096])
    return found


def _growth(shape: str, short: Run, long: Run) -> dict[str, dict[str, Any]]:
    """What 3,072 more prompt tokens cost, ours over the peer's that they cost least."""
    few, many, found = measured(short), measured(long), dict[str, dict[str, Any]]()
    dense, pruned = mixed(long, "dense"), mixed(long, "keep 25 %")
    peers = [name for name in few if name in many and few[name]["peer"]]
    for key, what in (("total_s", "time"), ("peak_rss", "peak RSS")):
        if dense and dense["contender"] in few and peers:
            least = min(many[name][key] - few[name][key] for name in peers)
            more = dense[key] - few[dense["contender"]][key]
            found[f"{shape}: {dense['contender']}, growth of {what} from 1024 to 4096 over the least of all peers"] = (
                target(more / max(least, 1e-9), 1.0, at_least=False)
            )
    if dense and pruned:
        saved = 1 - pruned["kv_bytes"] / dense["kv_bytes"]
        found[f"{shape}, prompt 4096: KV bytes that keep 25 % saves"] = target(saved, 0.5)
    return found


def picture(runs: Sequence[Run]) -> str:
    """SVG: a bar for each contender's whole answer, its first part until the first token; a panel for each run."""
    parts, y = [], EDGE
    for run in runs:
        rows = sorted(measured(run).values(), key=lambda row: row["total_s"])
        longest = max((row["total_s"] for row in rows), default=1.0)
        parts.append(_text(EDGE, y + BAR, heading(run), "font-weight='bold'"))
        y += BAR + 2 * GAP
        for row in rows:
            first, whole = (row[key] / longest * WIDTH for key in ("ttft_s", "total_s"))
            colour, x = (BEST if row["peer"] else PROBE), EDGE + LABEL
            parts.append(_text(x - GAP, y + BAR - 3, row["contender"], "text-anchor='end'"))
            parts.append(f'<rect x="{x}" y="{y}" width="{first:.1f}" height="{BAR}" fill="{colour}"/>')
            rest = f'width="{whole - first:.1f}" height="{BAR}" fill="{colour}" fill-opacity="0.45"'
            parts.append(f'<rect x="{x + first:.1f}" y="{y}" {rest}/>')
            parts.append(_text(round(x + whole + GAP), y + BAR - 3, f"{row['total_s']:.2f} s", f"fill='{MUTED}'"))
            y += BAR + GAP
        y += 2 * GAP
    size = f"{EDGE + LABEL + WIDTH + 70} {y + EDGE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
        "<title>Seconds for a whole answer, dark until the first token; ours blue, peers orange</title>"
        '<rect width="100%" height="100%" fill="#fff"/>'
        f"<style>text{{font:11px system-ui,sans-serif;fill:{INK}}}</style>{''.join(parts)}</svg>\n"
    )


def _text(x: int, y: int, text: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
