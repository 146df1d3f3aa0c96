"""Python of the page on generating from Python, run as it stands with a tiny bundle of two prune stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fstq_infer.bundle import Bundle
from tests.docs.pages import Block, blocks

PAGE = "docs/howto/python.md"
SNIPPETS = [block for block in blocks(PAGE) if block.language == "python"]


@pytest.fixture(scope="module")
def folder(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds my.bundle, which knows what "auto" means."""
    place = tmp_path_factory.mktemp("snippets")
    shutil.copytree(tiny_bundle.path, place / "my.bundle")
    manifest = place / "my.bundle" / "manifest.json"
    described = json.loads(manifest.read_text(encoding="utf-8"))
    described["pruning"]["auto"] = {"mass": 0.5, "floor": 4}
    manifest.write_text(json.dumps(described), encoding="utf-8")
    return place


@pytest.mark.parametrize("block", SNIPPETS, ids=[block.heading or block.place for block in SNIPPETS])
def test_snippet(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FSTQ_CACHE", str(folder / "cache"))
    exec(compile(block.text, block.place, "exec"), {"__name__": "snippet"})
    assert (folder / "cache" / "engines").is_dir()
