"""fstq_export.report: what the page says, that hostile text stays text, and that the page loads nothing."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fstq_export import wording
from fstq_export.plots import (
    best_baseline,
    difference_plot,
    formats_plot,
    quality_panels,
    quality_plot,
    sensitivity_plot,
)
from fstq_export.report import heat_map, precision_verdict, render, time_bars, verdict, write_report
from hypothesis import given
from hypothesis import strategies as st

from fstq_infer.errors import ExportError, MissingExtraError

matplotlib = pytest.importorskip("matplotlib")

PROBE = "distilled from gate"
Report = dict[str, Any]
DENSE = 0.92
VOID = {"meta", "br"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "div", "dl", "dt", "dd", "small",
    "span", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "i", "b", "s", "br", "details",
    "summary", "svg", "g", "defs", "path", "use", "clippath", "rect", "text",
}  # fmt: skip
HOSTILE = (
    "<script>alert(1)</script>", '" onmouseover="alert(1)', "' onclick='x", "</span></div></body>", "<!--", "]]>",
    "&lt;", "{{ 7 * 7 }}", "{% raw %}", "$x^2$", "\x00\x1b[31m", "\ud800", "\u202eetirw", "\u2066", "x:y", "",
)  # fmt: skip


def point(keep: float, exact: float) -> dict[str, float]:
    return {"keep": keep, "exact": exact, "nll": 1 - exact, "drop": (DENSE - exact) / DENSE}


def full() -> Report:
    """A report in which everything was measured and a setting was chosen."""
    tokens = ["It", " was", "\n", " Joe", " has", " a", " car", "."]
    return {
        "format": "fstq-report",
        "version": 1,
        "model": {
            "source": "stories260k",
            "architecture": "LlamaForCausalLM",
            "layers": 5,
            "parameters": 262144,
            "dtype": "float32",
        },
        "calibration": {
            "items": 1500,
            "held_out": 300,
            "left_out": 12,
            "prompt_tokens": {"median": 247, "max": 301},
            "score": "gate",
            "probes": [PROBE],
            "metric": "exact match",
            "dense": {"exact": DENSE, "nll": 0.08},
            "max_quality_drop": 0.01,
            "adaptive": {
                "chosen": {"mass": 0.9, "floor": 59},
                "rows": [
                    {**point(0.6, 0.92), "mass": 0.95, "bound": 0.01},
                    {**point(0.4, 0.918), "mass": 0.9, "bound": 0.012},
                ],
            },
            "candidates": [
                {
                    "layers": [layer],
                    "keeps": [keep],
                    **point(keep, exact),
                    "probe": PROBE,
                    "relative_cost": layer / 5 + keep * (1 - layer / 5),
                }
                for layer in (1, 2)
                for keep, exact in ((0.75, 0.9), (0.5, 0.88 if layer == 1 else 0.9163), (0.25, 0.7))
            ],
            "chosen": {
                "layers": [2],
                "keeps": [0.5],
                **point(0.5, 0.9163),
                "interval": [-0.006, 0.014],
                "bound": 0.014,
            },
            "met": True,
            "curves": {
                "probe": [point(0.5, 0.9163), point(0.25, 0.7)],
                "random": [point(0.5, 0.16), point(0.25, 0.04)],
                "gate": [point(0.5, 0.77)],
            },
            "sensitivity_by_layer": [0.1, 0.2, 0.4, 0.2, 0.1],
            "example": {
                "tokens": tokens,
                "scores": [0.1, 0.0, 0.3, 0.9, 0.2, 0.4, 0.8, 0.05],
                "kept": [True, False, False, True, False, True, True, True],
                "keep": 0.5,
                "question_start": 3,
                "answer": " round car.",
            },
            "seconds": {"observe": 15.2, "tune": 61.7},
        },
        "verification": {
            "tolerance": 1e-3,
            "dense": {"logits": 2.1e-5, "by_layer": [0.0, 9e-7, 2.2e-6, 4e-6, 2.1e-5]},
            "pruned": {"logits": 3.4e-5, "kept_equal": True},
            "prompts": 2,
            "decode_steps": 16,
        },
        "graph": {"stages": [{"layer": 2, "sink": 1, "window": 16}], "bytes": 1_534_000, "nodes": 812},
        "timing": {
            "tokens": 168,
            "random": False,
            "keep": 0.5,
            "kept": 84,
            "dense_ms": {"embedding": 0.1, "layers before": 0.9, "layers after": 4.0, "head": 0.04},
            "dense_probe_ms": 1.5,
            "pruned_ms": {
                "embedding": 0.1,
                "layers before": 0.9,
                "probe and selection": 1.4,
                "layers after": 1.56,
                "head": 0.04,
            },
            "machine": {"cpu": "AMD EPYC", "cores": 2, "system": "Linux x86_64", "python": "3.11.7"},
        },
        "resources": {"seconds": 171.4, "peak_rss_bytes": 1_310_000_000, "steps": {"calibrate": 150.0, "verify": 8.4}},
    }


def uncalibrated() -> Report:
    report = full()
    report["calibration"], report["graph"]["stages"], report["verification"]["pruned"] = None, [], None
    report["timing"] |= {
        "random": True,
        "keep": 1.0,
        "dense_ms": {"embedding": 0.1, "layers": 4.9, "head": 0.04},
        "dense_probe_ms": None,
        "pruned_ms": None,
    }
    return report


def unmet() -> Report:
    report = full()
    report["calibration"] |= {"chosen": None, "met": False, "example": None}
    report["calibration"]["candidates"] = [
        {"layers": [2], "keeps": [0.75], **point(0.75, 0.8832), "probe": PROBE, "relative_cost": 0.85}
    ]
    report["calibration"]["adaptive"] = {"chosen": None, "rows": [{**point(0.7, 0.8832), "mass": 0.98, "bound": 0.08}]}
    report["graph"]["stages"], report["verification"]["pruned"] = [], None
    report["timing"] = {"skipped": "the model has more than 200 million parameters"}
    return report


def few_bits() -> Report:
    """Mixed precision, measured beside other rules."""
    report = full()
    names = ["model.embed_tokens", "model.layers.0.self_attn.q_proj+k_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    formats = ["int8", "int4-32", "int4-128", "fp16"]
    groups = [
        {"name": name, "format": form, "bits": bits, "bytes": 1000, "damage": 0.001}
        for name, form, bits in zip(names, formats, (8.25, 4.5, 4.125, 16.0), strict=True)
    ]
    row = {"bits": 5.0, "bytes": 160_000, "nll": 1.25, "divergence": 0.02, "damage": 0.021}
    row |= {"drop": 0.012, "answers": 0.5, "exact": 0.8}
    report["precision"] = {
        "plan": {"budget": "5 bits per weight", "bits": 4.998, "bytes": 161_000, "damage": 0.021, "groups": groups},
        "measured": {
            "texts": 96,
            "tokens": 24_000,
            "rows": [
                row | {"name": "unquantized", "bits": 32.0, "drop": 0.0, "divergence": 0.0},
                row | {"name": "plan"},
                row | {"name": "uniform int4", "drop": 0.05},
            ],
        },
    }
    return report


def test_what_formats_cost_alone_and_how_long_they_take_is_said() -> None:
    report = few_bits()
    assert "formats alone" not in verdict(report)
    report["calibration"]["formats"] = {"keep": 1.0, "exact": 0.9, "nll": 0.09, "drop": 0.02}
    assert verdict(report).endswith(
        "The weights' formats alone, every token kept: costs 2 % of exact match; all is beside unquantized weights."
    )
    report["precision"]["plan"] |= {"latency": 0.25, "latency_of": "1024 prompt tokens; a board"}
    assert "in all matrices for 1024 prompt tokens; a board" in precision_verdict(report["precision"])
    assert "every token kept" in render(report)


def plain_bits() -> Report:
    """One format for all, nothing measured, no answers."""
    report = few_bits()
    report["calibration"], report["precision"]["measured"] = None, None
    return report


def by_nll() -> Report:
    report = full()
    report["calibration"]["metric"] = "nll"
    return report


def hostile() -> Report:
    """Every string that comes from outside is an attack."""
    report = full()
    count = len(HOSTILE)
    report["model"] |= {"source": HOSTILE[0], "architecture": HOSTILE[1], "dtype": HOSTILE[3]}
    report["calibration"]["example"] = {
        "tokens": list(HOSTILE),
        "scores": [float(i) for i in range(count)],
        "kept": [i % 2 == 0 for i in range(count)],
        "keep": 0.5,
        "question_start": None,
        "answer": "<img src=x onerror=alert(1)>",
    }
    report["calibration"]["curves"] = {name: [point(0.5, 0.5)] for name in HOSTILE}
    report["calibration"]["seconds"] = {name: 1.0 for name in HOSTILE}
    report["resources"]["steps"] = {name: 1.0 for name in HOSTILE}
    report["timing"]["machine"] |= {"cpu": "".join(HOSTILE)}
    return report


REPORTS = {"full": full, "uncalibrated": uncalibrated, "unmet": unmet, "nll": by_nll, "hostile": hostile}
REPORTS |= {"few bits": few_bits, "plain bits": plain_bits}


class Page(HTMLParser):
    """What a browser makes of the page: tags, attributes, text; elements must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.tokens: list[tuple[str, str]] = []
        self.text, self._open = "", [""]
        self.feed(html)
        self.close()
        assert self._open == [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if dict(attrs).get("title", "") and tag in ("span", "s"):
            self.tokens.append((tag, ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] == "style":
            return
        self.text += data
        if self._open[-1] in ("span", "s") and "div" in self._open:
            self.tokens[-1] = (self.tokens[-1][0], self.tokens[-1][1] + data)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render(make()) for name, make in REPORTS.items()}


def plain(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").replace("−", "-").split())


@pytest.mark.parametrize("name", REPORTS)
def test_writes_both_files(name: str, tmp_path: Path) -> None:
    report = REPORTS[name]()
    before = copy.deepcopy(report)
    write_report(tmp_path, report)
    assert report == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert text.startswith('{\n "format": "fstq-report"')
    page = (tmp_path / "report.html").read_bytes()
    assert page.startswith(b"<!doctype html>") and page.endswith(b"</html>\n")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path, report)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_sound_and_loads_nothing(name: str, pages: dict[str, str]) -> None:
    page = Page(pages[name])
    assert page.tags <= TAGS
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    for _tag, attribute, value in page.attributes:
        assert not attribute.startswith("on") and attribute not in ("src", "srcset", "action", "formaction")
        if attribute in ("href", "xlink:href"):
            assert value.startswith("#")
        if attribute == "style":
            assert all(target.startswith("#") for target in re.findall(r"url\(\s*(.)", value))
    style = re.findall(r"<style>(.*?)</style>", pages[name], re.S)[0]
    assert "url(" not in style and "@import" not in style
    ids = Counter(value for _, attribute, value in page.attributes if attribute == "id")
    assert all(times == 1 for times in ids.values())
    used = {value[1:] for _, attribute, value in page.attributes if attribute in ("href", "xlink:href")}
    assert used <= set(ids)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c != "\n" for c in pages[name])


def test_full_page_says_what_was_measured(pages: dict[str, str]) -> None:
    text = plain(Page(pages["full"]).text)
    assert verdict(full()) in text
    headings = re.findall("<h2>(.*?)</h2>", pages["full"])
    assert headings == [
        "Quality against tokens kept", "Where the prompt matters", "One prompt, token by token",
        "Where the time goes", "Settings tried", "Adaptive keep", "Does the graph compute the model?",
        "What the export took", "Provenance",
    ]  # fmt: skip
    assert pages["full"].count("<svg ") == 3
    for part in (
        "12 left out",
        "1.22 GiB",
        "2 min 30 s",
        "2.1e-05",
        "tokens leave before layer 2",
        "5 of its 8 tokens",
        "the first and the last 16 always do",
        "“random”, on average the best of the other strategies",
        "lines, “gate”, know the answer",
        "takes 5.04 ms dense and 4 ms with 50 % of it kept: 1.26 times as fast",
        "less its probe (1.5 ms)",
    ):
        assert part in text
    assert '<tr class="chosen"><td class="n">2</td>' in pages["full"]
    assert '<tr class="chosen"><td class="n">90\u00a0%</td>' in pages["full"]
    assert "prompts of up to 59 tokens stay whole" in text
    assert "prefers-color-scheme:dark" in pages["full"]


def test_page_without_calibration(pages: dict[str, str]) -> None:
    assert "Exported without calibration data: nothing is known about quality" in pages["uncalibrated"]
    assert pages["uncalibrated"].count("<svg ") == 1
    assert pages["uncalibrated"].count('<div class="stack">') == 1
    text = plain(Page(pages["uncalibrated"]).text)
    assert "takes 5.04 ms dense." in text and "One prefill of random tokens" in text
    assert "Settings tried" not in pages["uncalibrated"]


def test_page_of_an_unmet_contract(pages: dict[str, str]) -> None:
    assert 'class="verdict unmet"' in pages["unmet"]
    assert "this bundle is dense" in pages["unmet"]
    assert "Not measured: the model has more than 200 million parameters." in pages["unmet"]
    assert "Settings tried" in pages["unmet"] and '<tr class="chosen">' not in pages["unmet"]
    assert "No share is within both, so this bundle does not offer it." in pages["unmet"]


def test_hostile_tokens_stay_text(pages: dict[str, str]) -> None:
    page = Page(pages["hostile"])
    assert [text for _, text in page.tokens] == [wording.visible(token) or "·" for token in HOSTILE]
    assert [tag for tag, _ in page.tokens] == ["span" if i % 2 == 0 else "s" for i in range(len(HOSTILE))]
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "⟨U+0000⟩⟨U+001B⟩[31m" in page.text and "⟨U+D800⟩" in page.text and "\u202e" not in page.text


CASES: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "Keeping 50 % of the prompt from layer 2 on costs 0.4 % of exact match on 300 held-out items "
        "(95 % interval -0.6 to 1.4 %): within the 1 % you allowed, though 300 items cannot rule out a cost of 1.4 %.",
    ),
    (
        {"chosen": {"interval": [-0.006, 0.009], "bound": 0.009}},
        "(95 % interval -0.6 to 0.9 %): within the 1 % you allowed.",
    ),
    (
        {"chosen": {"interval": [-0.01, 0.0], "bound": 0.0326}, "held_out": 100, "met": False},
        "(95 % interval -1 to 0 %): so few items cannot rule out a cost of 3.26 %, more than the 1 % you allowed; "
        "calibrate with more.",
    ),
    ({"chosen": {"drop": -0.002}}, "Keeping 50 % of the prompt from layer 2 on costs no exact match on 300"),
    (
        {"chosen": {"drop": 0.12}, "met": False},
        "costs 12 % of exact match on 300 held-out items (95 % interval -0.6 to",
    ),
    ({"met": False, "chosen": {"drop": 0.02}}, ": the 1 % you allowed is not met."),
    (
        {"metric": "nll"},
        "Keeping 50 % of the prompt from layer 2 on raises the negative log-likelihood by 0.4 % on 300",
    ),
    ({"metric": "nll", "chosen": {"drop": 0.0}}, "on does not raise the negative log-likelihood on 300 held-out items"),
    (
        {"chosen": None, "met": False},
        "No setting is sure to meet the 1 % you allowed: 300 held-out items cannot rule out more, calibrate with more "
        "items: by default this bundle keeps every token.",
    ),
    (
        {"chosen": None, "met": False, "candidates": [full()["calibration"]["candidates"][0]]},
        "No setting met the 1 % you allowed (the closest, keeping 75 % of the prompt from layer 1 on, costs 2.17 % of "
        "exact match on 300 held-out items): by default this bundle keeps every token.",
    ),
    ({"chosen": None, "met": False, "candidates": []}, "No setting met the 1 % you allowed: by default"),
    ({"chosen": None, "met": True}, "Pruning was not asked for: by default this bundle keeps every token."),
]


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_verdict(change: dict[str, Any], expected: str) -> None:
    report = full()
    calibration = report["calibration"]
    calibration["chosen"]["drop"] = 0.004
    for key, value in change.items():
        calibration[key] = calibration[key] | value if isinstance(value, dict) else value
    assert expected in verdict(report)
    assert expected in plain(Page(render(report)).text)


def test_several_stages_are_told_apart() -> None:
    report = full()
    report["graph"]["stages"].append({"layer": 3, "sink": 1, "window": 16})
    setting = {"layers": [2, 3], "keeps": [0.7, 0.5], **point(0.5, 0.9163)}
    report["calibration"]["chosen"] |= setting
    carried = "scores carried on from layer 2"
    report["calibration"]["candidates"].append({**setting, "probe": carried, "relative_cost": 0.74})
    report["calibration"]["probes"].append(carried)
    page = Page(render(report))
    assert verdict(report).startswith("Keeping 70 % of the prompt from layer 2 on and 50 % from layer 3 on costs")
    text = plain(page.text)
    assert "50 % from layer 3 of 5, 70 % from layer 2" in text and "cost of a prompt0.74" in text
    assert (
        "tokens kept are those after the last stage" in text and "5 of its 8 tokens stay after the last stage" in text
    )
    assert "mean layer 2, where tokens first leave" in text and f"{PROBE}; then {carried}" in text


def test_verdict_without_calibration() -> None:
    report = uncalibrated()
    assert verdict(report).endswith("nothing is known about quality; this bundle is dense.")
    report["graph"]["stages"] = full()["graph"]["stages"]
    assert verdict(report).endswith("what dropping tokens costs was not measured.")


def test_plots_are_xml_with_page_colours() -> None:
    report = full()
    plots = [
        quality_plot(report["calibration"]),
        sensitivity_plot([0.5, 0.5], [1]),
        difference_plot([1e-6, 1e-5], 1e-3),
    ]
    for svg in plots:
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and set(root.attrib) == {"viewBox", "role"}
        assert "var(--probe, #0072b2)" in svg and "matplotlib" not in svg
    assert "chosen" in plots[0] and "gate" in plots[0]


@pytest.mark.parametrize(
    "change",
    [
        {"curves": {}},
        {"curves": {"probe": [point(1.0, DENSE)]}},
        {"curves": {"probe": []}, "chosen": None},
        {"curves": {str(i): [point(0.5, 0.0)] for i in range(12)}},
        {"dense": {"exact": 0.0, "nll": 0.0}},
        {"curves": {"$\\frac$": [point(0.5, 0.3)]}},
        {"metric": "nll", "max_quality_drop": 0.0},
        {"curves": {"probe": [point(1 / n, 0.5) for n in range(2, 200)]}},
    ],
)
def test_quality_plot_of_odd_measurements(change: dict[str, Any]) -> None:
    ElementTree.fromstring(quality_plot(full()["calibration"] | change))


def test_best_baseline_is_the_best_on_average_where_all_were_measured() -> None:
    lines = {
        "probe": {0.5: 99.0},
        "gate": {0.5: 98.0},
        "random": {0.5: 10.0, 0.25: 5.0, 0.1: 90.0},
        "window": {0.5: 20.0, 0.25: 1.0},
        "recency": {0.5: 9.0, 0.25: 9.0},
    }
    assert best_baseline(lines, higher=True) == "window"
    assert best_baseline(lines, higher=False) == "random"
    assert best_baseline({"probe": {0.5: 1.0}, "gate": {0.5: 1.0}}, higher=True) is None
    assert best_baseline({"random": {0.5: 1.0}, "window": {0.25: 1.0}}, higher=True) is None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_quality_panels_show_every_model_and_length(count: int) -> None:
    scorers = ("probe", "gate", "random", "recency", "snapkv")
    rows = [
        {"model": f"m<{n}>", "tokens": 1000 + n, "scorer": scorer, "keep": keep}
        | {"exact": 0.6, "low": 0.5, "high": 0.7, "dense": 0.9}
        for n in range(count)
        for scorer in scorers
        for keep in (0.5, 0.25)
    ]
    text = " ".join(ElementTree.fromstring(quality_panels(rows)).itertext())
    for n in range(count):
        assert f"m<{n}>, prompts of {1000 + n:,} tokens" in text
    assert all(text.count(name) == count for name in scorers)


def test_time_bars_share_one_scale() -> None:
    timing = full()["timing"]
    dense, pruned = time_bars(timing)["bars"]
    assert (dense["name"], pruned["name"]) == ("dense", "pruned, 50 % kept")
    assert sum(width for _, _, width in dense["parts"]) == pytest.approx(1)
    assert sum(width for _, _, width in pruned["parts"]) == pytest.approx(4.0 / 5.04)
    assert [part for part, _, _ in pruned["parts"]] == time_bars(timing)["names"]
    assert time_bars(timing | {"pruned_ms": None, "dense_ms": {"layers": 0.0}})["bars"][0]["total"] == 0


@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 3, [1e-9] * 200, [1e30, 1e-30]])
def test_layer_plots_of_odd_measurements(values: list[float]) -> None:
    ElementTree.fromstring(sensitivity_plot(values, [0, 1, 2]))
    ElementTree.fromstring(difference_plot(values, 1e-3))
    ElementTree.fromstring(difference_plot(values, 0.0))


def test_plots_ignore_and_keep_the_users_style() -> None:
    expected = render(full())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        assert render(full()) == expected
        assert dict(matplotlib.rcParams) == before


def test_heat_map_levels_are_ranks() -> None:
    example = {"tokens": list("abcdefghij"), "scores": [-5, 1e-9, 1e-8, 2, 3, 4, 5, 6, 7, 1e9], "kept": [True] * 10}
    assert [row["level"] for row in heat_map(example)["rows"]] == list(range(10))
    assert {row["level"] for row in heat_map(example | {"scores": [1.0] * 10})["rows"]} == {0}
    assert heat_map({"tokens": [], "scores": [], "kept": []})["rows"] == []
    with pytest.raises(ValueError):
        heat_map(example | {"kept": [True]})


def test_long_prompts_are_cut_in_the_middle() -> None:
    report, count = full(), 100_000
    report["calibration"]["example"] |= {
        "tokens": ["x" * 1000, *[" w"] * (count - 1)],
        "scores": [float(i) for i in range(count)],
        "kept": [True] * count,
    }
    page = render(report)
    assert len(page) < 1 << 20
    assert "96,000 tokens not shown" in page and "token 99999," in page and "token 50000," not in page
    assert "x" * 64 + "…" in page and "x" * 65 not in page


@given(st.text(st.characters(exclude_categories=[])))
def test_visible(text: str) -> None:
    shown = wording.visible(text)
    shown.encode("utf-8")
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert not any(unicodedata.category(c) == "Cf" and c not in "\u200c\u200d" for c in shown)


@pytest.mark.parametrize(("share", "text"), [
    (0.5, "50 %"), (0.125, "12.5 %"), (1.0, "100 %"), (0.0625, "6.25 %"), (-0.00001, "0 %"), (0.0004, "0.04 %"),
    (-0.006, "-0.6 %"), (12.345, "1,234 %"),
])  # fmt: skip
def test_percent(share: float, text: str) -> None:
    assert wording.percent(share) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0 ms"), (0.0000421, "0.0421 ms"), (0.00421, "4.21 ms"), (0.25, "250 ms"), (12.34, "12.3 s"),
    (150.0, "2 min 30 s"),
])  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert wording.seconds(seconds) == text


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("calibration.chosen.interval.1", lambda r: r["calibration"]["chosen"].update(interval=[0.0, float("nan")])),
        (
            "verification.dense.by_layer.2",
            lambda r: r["verification"]["dense"]["by_layer"].__setitem__(2, float("inf")),
        ),
        ("format and version", lambda r: r.update(version=2)),
        ("format and version", lambda r: r.pop("format")),
    ],
)
def test_refused_reports_write_nothing(place: str, change: Any, tmp_path: Path) -> None:
    report = full()
    change(report)
    with pytest.raises(ExportError, match=re.escape(place)):
        write_report(tmp_path, report)
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*fstq-infer\[export\]"):
        write_report(tmp_path, full())
    assert not list(tmp_path.iterdir())


def test_import_loads_no_matplotlib() -> None:
    code = "import sys, fstq_export.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_formats_are_told_in_a_sentence_a_table_and_bars(pages: dict[str, str]) -> None:
    text = plain(Page(pages["few bits"]).text)
    assert "Weights take 5.00 bits each, scales counted (157 KiB)" in text
    assert (
        "raises the negative log-likelihood by 1.2 % on 96 held-out texts; within the same bytes uniform int4 by 5 %"
        in text
    )
    assert "Asked for: 5 bits per weight" in text and "int4-128" in text
    assert "without calibration data nothing is known" in plain(Page(pages["plain bits"]).text)
    assert "Bits per weight" not in pages["full"]


def test_a_bar_for_each_group() -> None:
    groups = few_bits()["precision"]["plan"]["groups"]
    svg = formats_plot(groups)
    assert formats_plot(groups) == svg
    text = ElementTree.fromstring(svg)
    shown = [node.text for node in text.iter("{http://www.w3.org/2000/svg}text")]
    assert {"embed_tokens", "0", "lm_head", "int8", "int4-32", "int4-128", "fp16"} <= set(shown)
    many = [{"name": f"model.layers.{i}.x", "format": "int8", "bits": 8.0} for i in range(64)]
    assert formats_plot(many).count("<svg") == 1
