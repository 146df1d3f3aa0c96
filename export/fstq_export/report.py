"""A bundle's evidence: report.json as it was measured, and report.html, one page that loads nothing and runs nothing.

Knows the report's keys and how to show them; measures nothing. All text on the page is data from outside (tokens above
all): jinja2 escapes it, and characters that would not show, or would reorder the page, are spelled out.
"""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fstq_infer.errors import ExportError, MissingExtraError

METRICS = {"exact match": ("exact", "exact match"), "nll": ("nll", "negative log-likelihood")}  # key, name on the page
SHOWN_TOKENS, SHOWN_CHARACTERS = 4000, 64  # of the example prompt and of a token; the rest is in report.json
LEVELS = 10  # shades of the heat map

# Okabe and Ito's palette, told apart with any kind of colour vision. Each becomes a CSS variable with itself as the
# fallback, so that the page can lighten a colour on a dark ground and a plot still stands alone.
INK, MUTED, PROBE = "#1b1e23", "#666b73", "#0072b2"
BASELINES = {"random": "#8c8c8c", "recency": "#e69f00", "last-token": "#009e73", "window": "#cc79a7", "gate": "#d55e00"}
VARIABLES = {INK: "ink", MUTED: "muted", PROBE: "probe"}
MARKERS, DASHES = "svD^Pv", ((0, ()), (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)))


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into ``directory``.

    Raises ExportError when the report is of another format or holds a number that is not finite, and
    MissingExtraError without matplotlib; nothing is written then.
    """
    found = (report.get("format"), report.get("version"))
    if found != ("fstq-report", 1):
        raise ExportError(f"The report has format and version {found!r}, expected ('fstq-report', 1). Measure it again.")
    if place := _not_finite(report):
        raise ExportError(
            f"The report's {place} is not a finite number, so it cannot be written as JSON. Look for an overflow "
            f"(float16 models) or an empty measurement there, and export again."
        )
    text, page = json.dumps(report, indent=1, allow_nan=False) + "\n", render(report)
    (directory / "report.json").write_text(text, encoding="utf-8", newline="\n")
    (directory / "report.html").write_text(page, encoding="utf-8", newline="\n")


def render(report: dict[str, Any]) -> str:
    """The page of a report as HTML; the same report gives the same text. Raises MissingExtraError without matplotlib."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "typeset": _typeset, "size": _size, "seconds": _seconds}
    calibration, checked = report["calibration"], report["verification"]
    plots = {"differences": difference_plot(checked["dense"]["by_layer"], checked["tolerance"])}
    if calibration is not None:
        layers = [stage["layer"] for stage in report["graph"]["stages"]]
        plots["quality"] = quality_plot(calibration)
        plots["sensitivity"] = sensitivity_plot(calibration["sensitivity_by_layer"], layers)
    return environment.get_template("report.html.jinja").render(
        report,
        verdict=verdict(report),
        metric=METRICS[calibration["metric"]] if calibration else None,
        heat=heat_map(calibration["example"]) if calibration and calibration["example"] else None,
        plots={name: Markup(svg) for name, svg in plots.items()},  # our own drawing; matplotlib escapes the few names
    )


def verdict(report: dict[str, Any]) -> str:
    """What the export is worth, in one sentence of plain text."""
    calibration, stages = report["calibration"], report["graph"]["stages"]
    if calibration is None:
        end = "what dropping tokens costs was not measured." if stages else "this bundle is dense."
        return f"Exported without calibration data: nothing is known about quality; {end}"
    key, name = METRICS[calibration["metric"]]
    allowed, chosen = _percent(calibration["max_quality_drop"]), calibration["chosen"]

    def cost(drop: float) -> str:
        if key == "nll":
            return f"raises the {name} by {_percent(drop)}" if drop > 0 else f"does not raise the {name}"
        return f"costs {_percent(drop)} of {name}" if drop > 0 else f"costs no {name}"

    items = f"on {calibration['held_out']:,} held-out items"
    if chosen is None and calibration["met"]:
        return "Pruning was not asked for: this bundle is dense."
    if chosen is None:
        best = min(calibration["candidates"], key=lambda one: one["drop"], default=None)
        near = "none was tried" if best is None else (
            f"the closest, keeping {_percent(best['keep'])} of the prompt from layer {best['layer']} on, "
            f"{cost(best['drop'])} {items}"
        )
        return f"No setting met the {allowed} you allowed ({near}): this bundle is dense."
    low, high = (_percent(value) for value in chosen["interval"])
    end = f"within the {allowed} you allowed." if calibration["met"] else f"the {allowed} you allowed is not met."
    return (
        f"Keeping {_percent(chosen['keep'])} of the prompt from layer {chosen['layer']} on {cost(chosen['drop'])} "
        f"{items} (95 % interval {low.removesuffix(' %')} to {high}): {end}"
    )


def heat_map(example: dict[str, Any]) -> dict[str, Any]:
    """The example prompt as rows of text, level (0 .. LEVELS - 1, by rank among all scores), score and fate.

    A row's ``gap`` is the number of tokens left out of a long prompt before it.
    """
    tokens, scores, kept = example["tokens"], example["scores"], example["kept"]
    ranked, count = sorted(scores), len(tokens)
    pieces = not any(" " in token for token in tokens)  # vocabulary entries, not decoded text: spaces have stand-ins
    rows = []
    for index, (token, score, stays) in enumerate(zip(tokens, scores, kept, strict=True)):
        if SHOWN_TOKENS // 2 <= index < count - SHOWN_TOKENS // 2:
            continue
        text = token.translate({0x2581: " ", 0x120: " ", 0x10A: "\n", 0x109: "\t"}) if pieces else token
        text = "\n" if text == "<0x0A>" else text
        long = len(text) > SHOWN_CHARACTERS
        rows.append(
            {
                "text": text[:SHOWN_CHARACTERS] + "…" if long else text,
                "breaks": "\n" in text,
                "level": bisect_left(ranked, score) * LEVELS // count,
                "score": f"{score:.3g}",
                "kept": stays,
                "index": index,
                "gap": count - SHOWN_TOKENS if index and index == count - SHOWN_TOKENS // 2 and count > SHOWN_TOKENS else 0,
            }
        )
    return {"rows": rows, "kept": sum(kept), "count": count}


def quality_plot(calibration: dict[str, Any]) -> str:
    """SVG of the metric over the keep ratio, one line per scorer, dense and its limit across, the choice ringed."""
    key, name = METRICS[calibration["metric"]]
    dense, scale = calibration["dense"][key], 100 if key == "exact" else 1
    limit = dense * (1 + calibration["max_quality_drop"] * (-1 if key == "exact" else 1))
    curves, chosen = calibration["curves"], calibration["chosen"]
    figure, axes = _axes(7.2, 3.7, right=0.84)
    ends = [("dense", dense * scale, 1.0, MUTED)]
    axes.axhspan(dense * scale, limit * scale, color=PROBE, alpha=0.15, linewidth=0)
    axes.axhline(dense * scale, color=MUTED, linewidth=1)
    keeps = {1.0}
    for number, (scorer, points) in enumerate(sorted(curves.items(), key=lambda item: item[0] == "probe")):
        # Keeping everything is the dense model whatever the scorer, so every line starts there.
        line = sorted({1.0: dense, **{point["keep"]: point[key] for point in points}}.items(), reverse=True)
        x, y = [keep for keep, _ in line], [value * scale for _, value in line]
        ours, colour = scorer == "probe", PROBE
        if not ours:
            colour = BASELINES.get(scorer, list(BASELINES.values())[number % len(BASELINES)])
        style = {"linestyle": "-", "marker": "o"} if ours else {
            "linestyle": DASHES[number % len(DASHES)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        axes.plot(x, y, color=colour, linewidth=2.6 if ours else 1.1, markersize=5 if ours else 3.5, **style)
        ends.append((scorer, y[-1], x[-1], colour))
        keeps.update(x)
    if chosen is not None:
        sign = -1 if key == "exact" else 1
        low, high = sorted(dense * (1 + sign * drop) * scale for drop in chosen["interval"])
        keeps.add(chosen["keep"])
        axes.plot([chosen["keep"]] * 2, [low, high], color=INK, linewidth=1, marker="_", markersize=7)
        axes.plot([chosen["keep"]], [chosen[key] * scale], "o", markersize=11, color=INK, fillstyle="none", zorder=5)
        axes.annotate(
            "chosen", (chosen["keep"], high), (0, 7), textcoords="offset points", ha="center", va="bottom", weight="bold"
        )
    axes.margins(y=0.16)
    _keep_axis(axes, sorted(keeps, reverse=True))
    axes.set_ylabel(f"{name}, %" if key == "exact" else f"{name} (lower is better)", parse_math=False)
    if key == "exact":
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -3))
    _label_ends(axes, ends)
    return _svg(figure, "quality", f"{name} against the share of prompt tokens kept")


def sensitivity_plot(shares: Sequence[float], prune_layers: Sequence[int]) -> str:
    """SVG of each decoder layer's share of the sensitivity (sums to 1); layers that see fewer tokens are coloured."""
    figure, axes = _axes(7.2, 2.5)
    first = min(prune_layers, default=len(shares))
    axes.bar(range(len(shares)), [share * 100 for share in shares], 0.76,
             color=[PROBE if layer >= first else MUTED for layer in range(len(shares))], linewidth=0)
    top = max(shares, default=0) * 100 or 1
    axes.set_ylim(0, top * 1.25)
    for layer in prune_layers:
        axes.axvline(layer - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        late = layer > len(shares) / 2
        axes.annotate(f"tokens leave before layer {layer}", (layer - 0.5, top * 1.22), (-5 if late else 5, 0),
                      textcoords="offset points", ha="right" if late else "left", va="top")
    _layer_axis(axes, len(shares))
    axes.set_ylabel("sensitivity, %")
    return _svg(figure, "sensitivity", "share of the sensitivity by decoder layer")


def difference_plot(by_layer: Sequence[float], tolerance: float) -> str:
    """SVG of the largest difference to the reference after each decoder layer, on a log axis that ends at a floor."""
    figure, axes = _axes(7.2, 2.3)
    floor = min([value for value in (*by_layer, tolerance) if value > 0], default=1e-7) / 3
    axes.set_yscale("log")
    axes.axhline(max(tolerance, floor), color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate("tolerance", (1, max(tolerance, floor)), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", va="bottom", color=MUTED)
    axes.plot(range(len(by_layer)), [max(value, floor) for value in by_layer], color=PROBE, linewidth=1.2, marker="o",
              markersize=4)
    axes.set_ylim(floor / 1.6, max([floor, tolerance, *by_layer]) * 4)
    _layer_axis(axes, len(by_layer))
    axes.set_ylabel("largest difference")
    return _svg(figure, "difference", "largest difference to the reference by decoder layer")


def visible(text: str) -> str:
    """Text in which control, format, surrogate and unassigned characters are spelled out; newline and tab get signs."""

    def show(character: str) -> str:
        # Joiners shape letters in many scripts and reorder nothing, so they stay.
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
        if not hidden or character in "\u200c\u200d":
            return character
        return {"\n": "↵", "\t": "⇥"}.get(character, f"⟨U+{ord(character):04X}⟩")

    return text if text.isascii() and text.isprintable() else "".join(map(show, text))
