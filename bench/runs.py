"""Finished measurements of bench/inference.py: a file for each shape and prompt length, good for the same settings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    *("fstq-infer", "numpy", "onnx-ir", "onnxruntime", "mobius-onnx"),
    *("torch", "transformers", "onnxruntime-genai", "llama-cpp-python", "gguf"),
)
SETTINGS = ("new", "threads", "rounds")
ASK = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Differs(Exception):
    """A measurement is there that was made with other settings: the text says which."""


def versions(own: str, peers: str) -> dict[str, dict[str, str]]:
    """Of what is installed for our engines and for peers, by interpreter. Raises OSError, CalledProcessError."""

    def asked(python: str) -> dict[str, str]:
        done = subprocess.run([python, "-c", ASK, *PACKAGES], check=True, capture_output=True, text=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found

    return {"own": asked(own), "peers": asked(peers)}


def finished(path: Path, wanted: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether ``path`` holds these contenders, skipped ones too, measured as wanted. Raises Differs.

    wanted: ``SETTINGS``, and ``versions``, which older measurements do not tell and are not asked for.
    """
    if not path.exists():
        return False
    run = json.loads(path.read_text(encoding="utf-8"))
    if not set(names) <= {row["contender"] for row in run["rows"]}:
        return False
    apart = [f"{key} {run[key]}, not {wanted[key]}" for key in SETTINGS if run[key] != wanted[key]]
    for which, found in run.get("versions", {}).items():
        now = wanted["versions"][which]
        apart += [
            f"{name} {found.get(name, 'absent')}, not {now.get(name, 'absent')} ({which})"
            for name in PACKAGES
            if found.get(name) != now.get(name)
        ]
    if apart:
        raise Differs(
            f"{path} was measured with {'; '.join(apart)}. --again measures it anew, --runs FOLDER beside it, --report "
            "shows what is there"
        )
    return True
