"""fstq_export.demo.loop: the parts of the loop, and the whole of it with tiny settings where Flower is at hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("torch", reason="the loop needs the 'export' extra")
pytest.importorskip("mobius", reason="the loop needs the 'export' extra")

from fstq_export.adapters import Wanted
from fstq_export.demo import loop, loop_data, loop_fed
from fstq_export.demo.loop_data import Sizes
from fstq_export.demo.loop_fed import Federation
from fstq_export.pipeline import Request, export
from fstq_export.plots import before_after_plot
from fstq_export.recipe import Recipe
from safetensors.numpy import save_file

from fstq_infer.errors import OptionError, StateError

from .adapters import adapter

ROOT = Path(__file__).parents[2]
FLOWER = Path(os.environ.get("FSTQ_FEDERATED_PYTHON", ROOT / ".venv-federated/bin/python"))
ROWS: list[dict[str, Any]] = [
    {
        "weights": weights,
        "keep": keep,
        "domain_before": 0.0,
        "domain_after": 0.9,
        "known_before": 1.0,
        "known_after": 0.95,
    }
    for weights in ("fp32", "5 bits")
    for keep in (1.0, 0.5)
]


@pytest.mark.parametrize("preset", ["fstq", "mosaic", "lossless"])
def test_the_configuration_is_toml_with_the_folders_asked_for(preset: str, tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" folder'
    found = tomllib.loads(Federation(preset=preset, budget=900).config(odd / "model", odd / "data"))
    assert found["model"]["path"] == str(odd / "model")
    assert found["data"]["path"] == str(odd / "data/client-{client}.jsonl") and found["data"]["partition"] == "own"
    assert found["messages"] == {"preset": preset} | ({} if preset == "lossless" else {"bytes": 900})


def test_figures_count_what_fp32_would_have_sent(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": np.zeros((4, 5), np.float32), "b": np.zeros(5, np.float32)}, adapter / "adapter_model.safetensors")
    row = {"seconds": 1.5, "bytes_down": 300, "loss": 0.5}
    lines = [{**row, "used": 3, "bytes_up": 40}, {**row, "used": 2, "bytes_up": 10}]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = loop_fed.figures(tmp_path)
    assert (found["bytes_up"], found["bytes_up_fp32"], found["times_less"]) == (50, 5 * 25 * 4, 10.0)
    assert (found["rounds"], found["replies"], found["seconds"], found["bytes_down"]) == (2, 5, 3.0, 600)


def test_what_goes_wrong_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="make loop"):
        loop_fed.run(tmp_path, tmp_path, tmp_path, Federation(), tmp_path / "python", False)
    (tmp_path / "python").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(StateError, match=r"ended with 7.*fed run .*federation.toml --supernodes"):
        loop_fed.run(tmp_path, tmp_path, tmp_path, Federation(), tmp_path / "python", True)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        loop.main(["--out", str(tmp_path / "file")])


def test_an_interrupted_loop_waits_for_what_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(
        f"#!/bin/sh\ntrap 'sleep 1; touch {tmp_path}/ended; exit 1' TERM\ntouch {tmp_path}/begun\nsleep 60 &\nwait\n"
    )
    (tmp_path / "python").chmod(0o755)

    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        loop_fed.run(tmp_path, tmp_path, tmp_path, Federation(), tmp_path / "python", True)
    assert (tmp_path / "ended").exists()


def test_plot_is_the_same_bytes_and_says_what_it_shows() -> None:
    text = before_after_plot(ROWS)
    assert text == before_after_plot(ROWS)
    assert all(word in text for word in ("new domain", "known languages", "before the adapter", "5 bits", ">95<"))


@pytest.mark.slow
def test_questions_are_asked_without_and_with_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    loop_data.write(tmp_path, Sizes(rows=1, known=1, new=1, asked=3))
    random = adapter(loop.MODEL, tmp_path / "adapter", gain=2.0)
    export(Request(str(loop.MODEL), tmp_path / "b", Recipe(prune_layer=2), adapters=Wanted({loop.NAME: random})))
    rows = list(loop.asked(tmp_path / "b", "fp32", tmp_path, 1))
    assert [row["keep"] for row in rows] == list(loop.KEEPS)
    assert rows[0]["known_before"] > 0.5 and rows[0]["domain_before"] == rows[0]["domain_after"] == 0


def test_the_table_has_a_row_for_each_engine_and_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "kept": row["keep"], "prefill_ms_after": 4.25} for row in ROWS]
    sent = {"bytes_up": 10, "bytes_up_fp32": 500, "times_less": 50.0, "rounds": 2}
    settings = {"sizes": {"asked": 3}}
    loop.show({"rows": rows, "federation": sent, "settings": settings, "seconds": {"all": 9.0}}, tmp_path)
    said = capsys.readouterr().out
    assert said.count("dense") == 2 and said.count("95%") == 4 and "4.2" in said and "50x" in said


@pytest.mark.slow
@pytest.mark.skipif(not FLOWER.exists(), reason="no environment with Flower: 'make test-federated' makes it")
def test_the_whole_loop_with_tiny_settings(tmp_path: Path) -> None:
    tiny = {"rows": 24, "known": 24, "new": 24, "asked": 3, "rounds": 1, "steps": 2, "batch": 2, "budget": 4096}
    options = [part for name, value in tiny.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "fstq_export.demo.loop", "--out", str(tmp_path), "--python", str(FLOWER),
         "--one-process", "--bits", "32", *options],
        env={**os.environ, "FSTQ_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / loop.RESULT).read_text("utf-8"))
    assert found["federation"]["bytes_up"] <= 3 * 4096 < found["federation"]["bytes_up_fp32"]
    assert {row["keep"] for row in found["rows"]} >= {1.0} and found["rows"][0]["known_before"] > 0
    assert "exact answers" in done.stdout and (tmp_path / loop.PLOT).read_text().startswith("<svg")
