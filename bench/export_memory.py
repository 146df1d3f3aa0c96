"""Peak memory of export and build, weights in int4, beside the size of the checkpoint: Qwen2.5 0.5B and 1.5B shapes.

python bench/export_memory.py [--shapes 0.5B,1.5B] [--calib FILE]

About 10 minutes on 2 quiet cores and 12 GB of disk; writes results/export_memory.json. --calib: also the 0.5B shape at
5 bits with 16 items of a calibration file, each of at most 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import target, timed, write

SHAPES = Path(__file__).with_name("shapes.py")
FSTQ = [sys.executable, "-m", "fstq_infer"]
FORMAT, CALIB = "int4", ["--precision", "auto", "--bits", "5.0", "--calib-items", "16", "--max-prompt", "256"]


def row(shape: str, model: Path, work: Path, options: list[str], build: bool = True) -> dict[str, Any]:
    """Export with these options, and build; seconds and peak bytes of both, and the export's steps."""
    bundle, size = work / "model.bundle", sum(path.stat().st_size for path in model.glob("*.safetensors"))
    seconds, peak = timed([*FSTQ, "export", str(model), "--out", str(bundle), "--force", *options])
    found = {
        "shape": shape,
        "options": " ".join(option for option in options if not option.endswith(".jsonl")),
        "checkpoint_bytes": size,
        "export_seconds": seconds,
        "export_peak_rss": peak,
        "steps": json.loads((bundle / "report.json").read_text())["resources"]["steps"],
    }
    if build:
        found["build_seconds"], found["build_peak_rss"] = timed([*FSTQ, "build", str(bundle), "--force"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="0.5B,1.5B")
    parser.add_argument("--calib", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in given.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="fstq-bench-") as scratch:
            work = Path(scratch)
            timed([sys.executable, str(SHAPES), shape, str(work / "model")])
            rows.append(row(shape, work / "model", work, ["--precision", FORMAT]))
            if given.calib and shape == "0.5B":
                rows.append(row(shape, work / "model", work, [*CALIB, "--calib", str(given.calib)], build=False))
    targets = {
        f"{one['shape']} {one['options']}: export peak RSS over the checkpoint": target(
            one["export_peak_rss"] / one["checkpoint_bytes"], 2.0, at_least=False
        )
        for one in rows
        if one["shape"] == "1.5B"
    }
    plain = [one for one in rows if one["options"] == f"--precision {FORMAT}"]
    if len(plain) == 2:
        small, large = plain
        growth = (large["export_peak_rss"] - small["export_peak_rss"]) / (
            large["checkpoint_bytes"] - small["checkpoint_bytes"]
        )
        targets["export peak RSS, more bytes for each more byte of checkpoint"] = target(growth, 2.0, at_least=False)
    write("export_memory", "python bench/export_memory.py", rows, targets)


if __name__ == "__main__":
    main()
