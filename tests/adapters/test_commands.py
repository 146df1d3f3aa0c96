"""``fstq adapter add|list|remove``: what they print, for people and for programs, and how they fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fstq_infer.bundle import Bundle, BundleWriter
from fstq_infer.cli import app, main
from tests.adapters.samples import ports, write
from tests.bundles import BARE, fill


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        model = replace(BARE.model, layers=2, dtype="float32")
        writer.commit(replace(BARE, model=model, stages=(), pruning=replace(BARE.pruning, keep=1.0), lora=ports()))
    return tmp_path / "b"


def fstq(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_add_list_remove(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    med = write(tmp_path / "med")
    main_prints = ["adapter", "add", str(bundle), str(med)]
    with pytest.raises(SystemExit) as done:
        main(main_prints)
    assert done.value.code == 0 and "built engines stay valid" in capsys.readouterr().out
    for arguments in ((bundle, f"law={med}"), (bundle, med, "--name", "tax")):
        fstq("add", *arguments)
    assert sorted(Bundle.open(bundle).manifest.adapters) == ["law", "med", "tax"]
    with pytest.raises(SystemExit) as failed:
        main(main_prints)
    assert failed.value.code == 1 and "--force" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["adapter", "list", str(bundle), "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert listed["med"]["rank"] == 2 and listed["med"]["base"] == "tiny" and listed["med"]["pruning"] is None
    with pytest.raises(SystemExit):
        main(["adapter", "list", str(bundle)])
    assert "not measured" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["adapter", "remove", str(bundle), "med", "--json"])
    assert json.loads(capsys.readouterr().out) == {"removed": "med", "adapters": ["law", "tax"]}
    with pytest.raises(SystemExit) as unknown:
        main(["adapter", "remove", str(bundle), "lew"])
    assert unknown.value.code == 1 and "did you mean 'law'" in capsys.readouterr().err


def test_a_bundle_that_has_none_yet(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["adapter", "list", str(bundle)])
    assert done.value.code == 0 and "none yet: 'fstq adapter add'" in capsys.readouterr().out


def test_a_bundle_that_takes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        writer.commit(BARE)
    with pytest.raises(SystemExit):
        main(["adapter", "list", str(tmp_path / "b")])
    assert "takes no adapters" in capsys.readouterr().out
