"""What all benchmarks share: where results go, the machine they ran on, targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fstq_infer.atomic import replace_file
from fstq_infer.machine import description

RESULTS = Path(__file__).resolve().parent / "results"
SHARED = Path(os.environ.get("FSTQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A model or data set that is read where it lies; the benchmark ends with a reason when it is absent."""
    found = SHARED / path
    if not found.exists():
        print(f"skipped: {path} is not under {SHARED}; set FSTQ_SHARED to the folder that holds it")
        sys.exit(0)
    return found


def target(value: float, wanted: float, at_least: bool = True) -> dict[str, Any]:
    """A measured figure beside what was asked for."""
    return {
        "value": round(value, 4),
        "target": wanted,
        "at_least": at_least,
        "met": value >= wanted if at_least else value <= wanted,
    }


def write(name: str, command: str, rows: list[dict[str, Any]], targets: dict[str, dict[str, Any]]) -> None:
    """results/NAME.json, and a line for each target on standard output."""
    content = {"machine": description(), "command": command, "rows": rows, "targets": targets}
    path = RESULTS / f"{name}.json"
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    for what, figure in targets.items():
        sign = ">=" if figure["at_least"] else "<="
        print(f"{'met ' if figure['met'] else 'MISS'} {what}: {figure['value']} ({sign} {figure['target']})")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command in a process of its own; its output goes to standard error."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return time.monotonic() - began, usage.ru_maxrss * 1024
