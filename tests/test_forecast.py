"""``fstq plan``: shapes read from real graphs, rows, table, JSON, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fstq_infer import device, forecast
from fstq_infer.bundle import Bundle
from fstq_infer.errors import BundleError, FstqError, OptionError
from fstq_infer.roofline import weight_bytes

pytest.importorskip("onnx_ir", reason="reading a graph needs the 'ort' extra")

from fstq_infer.shape import decoder_of
from tests.conftest import LAYERS, VOCABULARY, WIDTH, write_bundle
from tests.export.families import FAMILIES, make
from tests.export.families import WIDTH as WIDE
from tests.jetson.scripts import ROOT, environment

SHAPES = sorted([(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)])


def plan(path: Path | None, capsys: pytest.CaptureFixture[str], **changes: object) -> tuple[int, str]:
    given: dict[str, object] = {"devices": ["orin-nano"], "mode": None, "prompt_tokens": 100, "new_tokens": 8}
    given |= {"keeps": None, "precision": None, "check": False, "json": True}
    code = forecast.plan(path, **(given | changes))  # type: ignore[arg-type]
    return code, capsys.readouterr().out


def test_shape_of_a_real_graph(tiny_bundle: Bundle) -> None:
    decoder = decoder_of(tiny_bundle)
    assert decoder.attention == ((4, 2, 8),) * LAYERS
    shapes = sorted((one.n, one.k) for one in decoder.linears if one.layer == 2)
    assert shapes == SHAPES
    assert [(one.n, one.k) for one in decoder.linears if one.layer is None] == [(VOCABULARY, WIDTH)]
    assert {one.format for one in decoder.linears} == {"fp32"}
    assert decoder.matrix_bytes < decoder.stored < 2 * decoder.matrix_bytes + 300_000


@pytest.mark.parametrize("form", ["fp16", "int8", "int8-dynamic", "int4-32"])
def test_shape_of_weights_in_few_bits(tiny_graph: Path, tmp_path: Path, form: str) -> None:
    from fstq_export import decoder as exporter

    from tests.export.test_quantize import built

    graph, _ = built(tiny_graph / "hf", form)
    (tmp_path / "graph").mkdir()
    exporter.save(graph, tmp_path / "graph")
    found = decoder_of(write_bundle(tmp_path / "b", tmp_path / "graph", ()))
    assert {one.format for one in found.linears} == {form}
    assert sorted((one.n, one.k) for one in found.linears if one.layer == 1) == SHAPES


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "qwen3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in ("gpt2", "qwen3")),
    ],
)
def test_shape_of_families(family: str, tmp_path: Path) -> None:
    """Every family's matrices are found: their parameters are nearly all there are."""
    from fstq_export import decoder as exporter
    from fstq_export import source

    make(family, tmp_path / "model")
    resolved = source.resolve(str(tmp_path / "model"))
    (tmp_path / "graph").mkdir()
    exporter.save(exporter.build_graph(resolved, "float32", ()), tmp_path / "graph")
    graph = write_bundle(tmp_path / "b", tmp_path / "graph", (), layers=4, hidden_size=WIDE)
    found = decoder_of(graph)
    assert {one.layer for one in found.linears} == {None, 0, 1, 2, 3}
    head = [one for one in found.linears if one.layer is None]
    assert max(one.n for one in head) >= VOCABULARY
    assert found.matrix_bytes > 0.5 * found.stored


def test_stored_as(tiny_bundle: Bundle) -> None:
    decoder = decoder_of(tiny_bundle)
    small = decoder.stored_as("int4-32")
    saved = sum(
        {
            one.weight: weight_bytes(one.n, one.k, "fp32") - weight_bytes(one.n, one.k, "int4-32")
            for one in decoder.linears
        }.values()
    )
    assert decoder.stored - small.stored == saved > 0
    with pytest.raises(OptionError, match="did you mean"):
        decoder.stored_as("int4-23")


def test_json(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(tiny_bundle.path, capsys, devices=["all"], keeps=[0.5, 0.25])
    rows = json.loads(text)["rows"]
    assert code == 0 and len(rows) == 3 * len(device.names())
    assert [row["keep"] for row in rows[:3]] == [1.0, 0.5, 0.25]
    assert [row["kept"] for row in rows[:3]] == [[100, 100], [71, 50], [50, 25]]
    assert rows[2]["ttft_s"] < rows[0]["ttft_s"] and rows[0]["fits"]


def test_table(tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    code, text = plan(tiny_bundle.path, capsys, json=False, mode="15W")
    assert code == 0 and "orin-nano" in text and "15W" in text and "not a measurement" in text and "--precision" in text


def test_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = plan(None, capsys, check=True)
    assert code == 0 and json.loads(text)["met"]
    assert plan(None, capsys, check=True, json=False)[0] == 0
    data = device.published()
    data["rows"][0]["decode_tokens_per_s"] = 5000
    monkeypatch.setattr(device, "published", lambda: data)
    code, text = plan(None, capsys, check=True)
    assert code == 1 and not json.loads(text)["met"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": []}, "no --device"),
        ({"devices": ["orin-nona"]}, "did you mean 'orin-nano'"),
        ({"mode": "17W"}, "power mode"),
        ({"prompt_tokens": 0}, "at least 1"),
        ({"prompt_tokens": 999}, "do not fit the context"),
        ({"keeps": [0.0]}, "0 < keep"),
        ({"precision": "nvfp4"}, "has no nvfp4"),
        ({"precision": "int3"}, "no format"),
    ],
)
def test_wrong_input(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(FstqError, match=words):
        plan(tiny_bundle.path, capsys, **changes)


@pytest.mark.parametrize(("name", "mode"), [("orin-nano", "15W"), ("agx-orin-64gb", "MAXN"), ("thor", "120W")])
def test_on_a_device_it_is_the_default(name: str, mode: str) -> None:
    found = forecast._here(environment(name))
    assert (found.name, found.mode.name) == (name, mode)


def test_a_laptop_is_no_device() -> None:
    with pytest.raises(OptionError, match="this is none"):
        forecast._here(environment("laptop"))


def test_the_page_shows_what_is_computed() -> None:
    """The table in docs/jetson.md, of published and predicted speeds."""
    page = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
    rows = [row for row in forecast.compare() if row["default"]]
    lines = [line for line in page.splitlines() if line.startswith("| Qwen3-")]
    shown = [float(cell) for line in lines for cell in line.strip("| ").split(" | ")[3:]]
    assert shown == [row[key] for row in rows for key in ("published", "predicted", "ratio")]


def test_no_bundle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no bundle is given"):
        plan(None, capsys)
    with pytest.raises(BundleError):
        plan(tmp_path / "nowhere", capsys)


def test_damaged_graphs(tiny_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes((tiny_graph / "model.onnx").read_bytes()[:5000] + b"\xff" * 99)
    with pytest.raises(BundleError):
        decoder_of(write_bundle(tmp_path / "cut", tmp_path / "graph"))
    with pytest.raises(BundleError, match="names 7 layers"):
        decoder_of(write_bundle(tmp_path / "other", tiny_graph, layers=7))
