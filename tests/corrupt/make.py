"""Writes the damaged bundles of this folder, byte for byte the same each time: ``python tests/corrupt/make.py``.

Written from docs/bundle-format.md without the package's own writer, so that reader and writer cannot agree on a
mistake. ``CASES`` maps each folder to the error it has to raise; ``whole`` has none and has to open.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTENT = {
    "model.onnx": b"\x08\x0astand-in for a graph",
    "model.onnx.data": bytes(range(64)),
    "tokenizer.json": b'{"version": "1.0"}\n',
    "chat_template.jinja": b"{{ messages[0].content }}\n",
    "plan.toml": b'format = "fstq-plan"\nversion = 1\n',
    "report.json": b'{"rows": []}\n',
    "report.html": b"<!doctype html><title>report</title>\n",
}
CASES: dict[str, str | None] = {
    "whole": None,
    "no-manifest": "BundleNotFoundError",
    "bad-json": "ManifestError",
    "bad-utf8": "ManifestError",
    "deep-json": "ManifestError",
    "duplicate-key": "ManifestError",
    "not-a-number": "ManifestError",
    "wrong-format": "ManifestError",
    "missing-key": "ManifestError",
    "wrong-type": "ManifestError",
    "older-version": "BundleVersionError",
    "newer-version": "BundleVersionError",
    "path-escape": "BundlePathError",
    "unknown-file": "BundlePathError",
    "missing-file": "BundlePathError",
    "declared-oversize": "BundleSizeError",
    "truncated": "BundleSizeError",
    "bit-flipped": "BundleChecksumError",
}


def entry(content: bytes) -> dict[str, Any]:
    """A row of ``files``."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest() -> dict[str, Any]:
    """A manifest with every key of the spec, for ``CONTENT``."""
    return {
        "format": "fstq-bundle",
        "version": 1,
        "files": {name: entry(content) for name, content in CONTENT.items()},
        "model": {
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "layers": 4,
            "hidden_size": 64,
            "vocab_size": 256,
            "max_positions": 512,
            "parameters": 100_000,
            "dtype": "float32",
        },
        "graph": {"contract": 1, "stages": [{"layer": 1, "sink": 4, "window": 16}]},
        "pruning": {
            "keep": 0.5,
            "score": "gate",
            "calibrated": True,
            "contract": {"met": True, "metric": "accuracy", "max_drop": 0.01, "drop": -0.002},
            "auto": {"mass": 0.9, "floor": 40},
        },
        "generation": {
            "bos_token_id": 1,
            "eos_token_ids": [2, 3],
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
        },
        "provenance": {
            "source": "example/tiny",
            "source_sha256": "0" * 64,
            "libraries": {"onnx": "1.19.0"},
            "seed": 0,
            "created": "2026-01-01T00:00:00Z",
            "tool": "fstq-infer 0.0.1",
        },
    }


def encode(data: Any) -> bytes:
    """manifest.json of ``data``."""
    return (json.dumps(data, indent=1) + "\n").encode()


def contents(case: str) -> dict[str, bytes]:
    """File name -> bytes of one case."""
    data, files = manifest(), dict(CONTENT)
    if case == "wrong-format":
        data["format"] = "gguf"
    elif case == "missing-key":
        del data["model"]["vocab_size"]
    elif case == "wrong-type":
        data["pruning"]["calibrated"] = 1
    elif case == "older-version":
        data["version"] = 0
    elif case == "newer-version":
        data["version"] = 2
        del data["generation"]  # what a newer format looks like is not known: the version is reported first
    elif case == "path-escape":
        data["files"]["../whole/model.onnx"] = data["files"]["model.onnx"]
    elif case == "unknown-file":
        files["weights.bin"] = b"x"
        data["files"]["weights.bin"] = entry(b"x")
    elif case == "missing-file":
        del files["model.onnx.data"]
    elif case == "declared-oversize":
        data["files"]["report.html"]["bytes"] = 2**40
    elif case == "truncated":
        files["model.onnx.data"] = files["model.onnx.data"][:-1]
    elif case == "bit-flipped":
        files["model.onnx.data"] = b"\x01" + files["model.onnx.data"][1:]
    text = encode(data)
    if case == "bad-json":
        text = text[: len(text) // 2]
    elif case == "bad-utf8":
        text = text.replace(b"example/tiny", b"example/\xfftiny")
    elif case == "deep-json":
        text = b'{"format": ' + b"[" * 2000  # enough for the default recursion limit of 1000
    elif case == "duplicate-key":
        text = text.replace(b'"format"', b'"format": "fstq-bundle",\n "format"')
    elif case == "not-a-number":
        text = text.replace(b'"temperature": 0.7', b'"temperature": NaN')
    if case != "no-manifest":
        files["manifest.json"] = text
    return files


def main() -> None:
    """Write every case anew."""
    for case in CASES:
        shutil.rmtree(HERE / case, ignore_errors=True)
        (HERE / case).mkdir()
        for name, content in contents(case).items():
            (HERE / case / name).write_bytes(content)


if __name__ == "__main__":
    main()
