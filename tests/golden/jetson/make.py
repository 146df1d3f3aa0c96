"""Writes the golden outputs of ``fstq doctor`` and of jetson/benchmark.py for recorded devices; run it as a script.

Read the difference before committing it.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from fstq_infer.doctor import command  # noqa: E402
from tests.jetson.scripts import ENVIRONMENTS, JETSONS, recorded_result, script  # noqa: E402


def doctor(name: str, as_json: bool) -> str:
    """What ``fstq doctor --replay`` prints, with its exit code."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = command.doctor(json=as_json, record=None, replay=ENVIRONMENTS / f"{name}.json")
    return text.getvalue() if as_json else f"{text.getvalue()}exit code {code}\n"


def outputs() -> dict[str, str]:
    """File name -> content."""
    made = {}
    for path in sorted(ENVIRONMENTS.glob("*.json")):
        made[f"doctor-{path.stem}.txt"] = doctor(path.stem, False)
        made[f"doctor-{path.stem}.json"] = doctor(path.stem, True)
    for name in (*JETSONS, "laptop"):
        content = recorded_result(name)
        made[f"benchmark-{name}.json"] = json.dumps(content, indent=1) + "\n"
        made[f"benchmark-{name}.md"] = script("report").markdown(content)
    return made


if __name__ == "__main__":
    for name, content in outputs().items():
        (Path(__file__).parent / name).write_text(content, encoding="utf-8")
