"""A bundle's evidence: report.json as it was measured, and report.html, one page that loads nothing and runs nothing.

Knows the report's keys and how to show them; measures nothing. All text on the page is data from outside (tokens above
all): jinja2 escapes it, and characters that would not show, or would reorder the page, are spelled out.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fstq_export.plots import (
    METRICS,
    best_baseline,
    curves,
    difference_plot,
    formats_plot,
    quality_plot,
    sensitivity_plot,
)
from fstq_export.wording import percent, seconds, size, typeset, visible
from fstq_infer.errors import ExportError
from fstq_infer.fisher.scores import TARGETS

SHOWN_TOKENS, SHOWN_CHARACTERS = 4000, 64  # of the example prompt and of a token; the rest is in report.json
LEVELS = 10  # shades of the heat map


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into ``directory``.

    Raises ExportError when the report is of another format or holds a number that is not finite, and
    MissingExtraError without matplotlib; nothing is written then.
    """
    found = (report.get("format"), report.get("version"))
    if found != ("fstq-report", 1):
        raise ExportError(
            f"The report has format and version {found!r}, expected ('fstq-report', 1). Measure it again."
        )
    if place := _not_finite(report):
        raise ExportError(
            f"The report's {place} is not a finite number, so it cannot be written as JSON. Look for an overflow "
            f"(float16 models) or an empty measurement there, and export again."
        )
    text, page = json.dumps(report, indent=1, allow_nan=False) + "\n", render(report)
    (directory / "report.json").write_text(text, encoding="utf-8", newline="\n")
    (directory / "report.html").write_text(page, encoding="utf-8", newline="\n")


def render(report: dict[str, Any]) -> str:
    """The page of a report as HTML, a pure function of it. Raises MissingExtraError without matplotlib."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "typeset": typeset, "size": size, "seconds": seconds}
    calibration, checked = report["calibration"], report["verification"]
    plots = {"differences": difference_plot(checked["dense"]["by_layer"], checked["tolerance"])}
    if calibration is not None:
        layers = [stage["layer"] for stage in report["graph"]["stages"]]
        plots["quality"] = quality_plot(calibration)
        plots["sensitivity"] = sensitivity_plot(calibration["sensitivity_by_layer"], layers)
    precision = report.get("precision")
    if precision is not None:
        plots["formats"] = formats_plot(precision["plan"]["groups"])
    return environment.get_template("report.html.jinja").render(
        report | {"precision": precision},
        verdict=verdict(report),
        formats=precision_verdict(precision) if precision is not None else None,
        metric=METRICS[calibration["metric"]] if calibration else None,
        best=best_baseline(curves(calibration), calibration["metric"] == "exact match") if calibration else None,
        references=[name for name in TARGETS if calibration and name in calibration["curves"]],
        time=time_bars(report["timing"]) if "skipped" not in report["timing"] else None,
        heat=heat_map(calibration["example"]) if calibration and calibration["example"] else None,
        plots={name: Markup(svg) for name, svg in plots.items()},  # our own drawing; matplotlib escapes the few names
    )


def verdict(report: dict[str, Any]) -> str:
    """What the export is worth, in one or two sentences of plain text."""
    calibration = report["calibration"]
    formats = calibration and calibration.get("formats")
    if not formats:
        return _verdict(report)
    alone = _cost(calibration["metric"], formats["drop"])
    return (
        f"{_verdict(report)} The weights' formats alone, every token kept: {alone}; all is beside unquantized weights."
    )


def _cost(metric: str, drop: float) -> str:
    key, name = METRICS[metric]
    if key == "nll":
        return f"raises the {name} by {percent(drop)}" if drop > 0 else f"does not raise the {name}"
    return f"costs {percent(drop)} of {name}" if drop > 0 else f"costs no {name}"


def _verdict(report: dict[str, Any]) -> str:
    calibration, stages = report["calibration"], report["graph"]["stages"]
    if calibration is None:
        end = "what dropping tokens costs was not measured." if stages else "this bundle is dense."
        return f"Exported without calibration data: nothing is known about quality; {end}"
    allowed, chosen = percent(calibration["max_quality_drop"]), calibration["chosen"]

    def cost(drop: float) -> str:
        return _cost(calibration["metric"], drop)

    def setting(one: dict[str, Any]) -> str:
        first, *later = zip(one["layers"], map(percent, one["keeps"]), strict=True)
        ends = [f" and {keep} from layer {layer} on" for layer, keep in later]
        return f"{first[1]} of the prompt from layer {first[0]} on{''.join(ends)}"

    items = f"on {calibration['held_out']:,} held-out items"
    dense = "by default this bundle keeps every token." if stages else "this bundle is dense."
    if chosen is None and calibration["met"]:
        return f"Pruning was not asked for: {dense}"
    if chosen is None and any(one["drop"] <= calibration["max_quality_drop"] for one in calibration["candidates"]):
        return (
            f"No setting is sure to meet the {allowed} you allowed: {calibration['held_out']:,} held-out items cannot "
            f"rule out more, calibrate with more items: {dense}"
        )
    if chosen is None:
        over = [one for one in calibration["candidates"] if one["drop"] > calibration["max_quality_drop"]]
        near = min(over, key=lambda one: one["drop"], default=None)
        said = f" (the closest, keeping {setting(near)}, {cost(near['drop'])} {items})" if near else ""
        return f"No setting met the {allowed} you allowed{said}: {dense}"
    low, high = (percent(value) for value in chosen["interval"])
    end, reach = f"within the {allowed} you allowed", percent(chosen["bound"])
    if not calibration["met"] and chosen["drop"] <= calibration["max_quality_drop"]:
        end = (
            f"so few items cannot rule out a cost of {reach}, more than the {allowed} you allowed; calibrate with more"
        )
    elif not calibration["met"]:
        end = f"the {allowed} you allowed is not met"
    elif chosen["bound"] > calibration["max_quality_drop"]:
        end += f", though {calibration['held_out']:,} items cannot rule out a cost of {reach}"
    return (
        f"Keeping {setting(chosen)} {cost(chosen['drop'])} {items} "
        f"(95 % interval {low.removesuffix(' %')} to {high}): {end}."
    )


def precision_verdict(precision: dict[str, Any]) -> str:
    """What the formats of the weights cost, in one sentence of plain text."""
    plan = precision["plan"]
    stored = f"Weights take {plan['bits']:.2f} bits each, scales counted ({size(plan['bytes'])})"
    if "latency" in plan:
        stored += f" and {seconds(plan['latency'])} in all matrices for {plan['latency_of']}"
    if precision["measured"] is None:
        return f"{stored}; without calibration data nothing is known of what that costs."
    rows = {row["name"]: row for row in precision["measured"]["rows"]}
    own = rows["plan"]["drop"]
    cost = f"raises the negative log-likelihood by {percent(own)}" if own > 0 else "does not raise the loss"
    others = [f"{name} by {percent(row['drop'])}" for name, row in rows.items() if name not in ("plan", "unquantized")]
    beside = f"; within the same bytes {', '.join(others)}" if others else ""
    return f"{stored}, which {cost} on {precision['measured']['texts']:,} held-out texts{beside}."


def time_bars(timing: dict[str, Any]) -> dict[str, Any]:
    """Measured times as bars: per bar its name, total (ms) and parts (name, ms, share of the longest bar)."""
    kept = f"pruned, {percent(timing['keep'])} kept"
    measured = {"dense": timing["dense_ms"]} | ({kept: timing["pruned_ms"]} if timing["pruned_ms"] else {})
    longest = max(sum(parts.values()) for parts in measured.values()) or 1.0
    names = list(next(reversed(measured.values())))  # the pruned bar's, where there is one: it has the probe too
    return {
        "names": names,
        "bars": [
            {
                "name": name,
                "total": sum(parts.values()),
                "parts": [(part, parts[part], parts[part] / longest) for part in names if part in parts],
            }
            for name, parts in measured.items()
        ],
    }


def heat_map(example: dict[str, Any]) -> dict[str, Any]:
    """The example prompt as rows of text, level (0 .. LEVELS - 1, by rank among all scores), score and fate.

    Tokens are pieces of text with their spaces; one without text (special, or half a character) shows as a dot. A
    row's ``gap`` is the number of tokens left out of a long prompt before it.
    """
    scores, kept = example["scores"], example["kept"]
    ranked, count, half = sorted(scores), len(scores), SHOWN_TOKENS // 2
    hidden = max(0, count - 2 * half)
    rows = [
        {
            "text": (text[:SHOWN_CHARACTERS] + "…" if len(text) > SHOWN_CHARACTERS else text) or "·",
            "breaks": "\n" in text,
            "level": bisect_left(ranked, score) * LEVELS // count,
            "score": f"{score:.3g}",
            "kept": stays,
            "index": index,
            "gap": hidden if index == half + hidden else 0,
        }
        for index, (text, score, stays) in enumerate(zip(example["tokens"], scores, kept, strict=True))
        if not half <= index < half + hidden
    ]
    return {"rows": rows, "kept": sum(kept), "count": count}


def _not_finite(value: Any, place: str = "") -> str:
    """Where in nested data the first number is that is NaN or infinite, such as ``dense.by_layer.3``; "" if none is."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_not_finite(part, f"{place}.{key}".lstrip(".")) for key, part in parts)
    return next((one for one in found if one), "")
