"""A bundle's evidence: report.json as it was measured, and report.html, one page that loads nothing and runs nothing.

Knows the report's keys and how to show them; measures nothing. All text on the page is data from outside (tokens above
all): jinja2 escapes it, and characters that would not show, or would reorder the page, are spelled out.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

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
BASELINES["embedding"] = "#d55e00"  # never beside gate: a report has the one its probe was trained on
VARIABLES = {INK: "ink", MUTED: "muted", PROBE: "probe"}
MARKERS, DASHES = "svD^Pv", ((0, ()), (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)))

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "fstq",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.labelpad": 6,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
P = ParamSpec("P")


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

    def setting(one: dict[str, Any]) -> str:
        return f"{_percent(one['keep'])} of the prompt from layer {one['layer']} on"

    items = f"on {calibration['held_out']:,} held-out items"
    dense = "by default this bundle keeps every token." if stages else "this bundle is dense."
    if chosen is None and calibration["met"]:
        return f"Pruning was not asked for: {dense}"
    if chosen is None:
        over = [one for one in calibration["candidates"] if one["drop"] > calibration["max_quality_drop"]]
        near = min(over, key=lambda one: one["drop"], default=None)
        said = f" (the closest, keeping {setting(near)}, {cost(near['drop'])} {items})" if near else ""
        return f"No setting met the {allowed} you allowed{said}: {dense}"
    low, high = (_percent(value) for value in chosen["interval"])
    end = f"within the {allowed} you allowed." if calibration["met"] else f"the {allowed} you allowed is not met."
    return (
        f"Keeping {setting(chosen)} {cost(chosen['drop'])} {items} "
        f"(95 % interval {low.removesuffix(' %')} to {high}): {end}"
    )


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


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Run a drawing function under this page's style, whatever matplotlibrc the machine has."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            import matplotlib
            import matplotlib.backends.backend_svg
            import matplotlib.figure
        except ImportError as error:
            raise MissingExtraError("the export report", error.name or "matplotlib", "export") from error
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return drawn


@_styled
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
        style = (
            {"linestyle": "-", "marker": "o"}
            if ours
            else {
                "linestyle": DASHES[number % len(DASHES)],
                "marker": MARKERS[number % len(MARKERS)],
            }
        )
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
            "chosen",
            (chosen["keep"], high),
            (0, 7),
            textcoords="offset points",
            ha="center",
            va="bottom",
            weight="bold",
        )
    axes.margins(y=0.16)
    _keep_axis(axes, sorted(keeps, reverse=True))
    axes.set_ylabel(f"{name}, %" if key == "exact" else f"{name} (lower is better)", parse_math=False)
    if key == "exact":
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -3))
    _label_ends(axes, ends)
    return _svg(figure, "quality", f"{name} against the share of prompt tokens kept")


@_styled
def sensitivity_plot(shares: Sequence[float], prune_layers: Sequence[int]) -> str:
    """SVG of each decoder layer's share of the sensitivity (they sum to 1), prune layers marked."""
    figure, axes = _axes(7.2, 2.5)
    colours = [PROBE if layer in prune_layers else MUTED for layer in range(len(shares))]
    axes.bar(range(len(shares)), [share * 100 for share in shares], 0.76, color=colours, linewidth=0)
    top = max(shares, default=0) * 100 or 1.0
    axes.set_ylim(0, top * (1.08 + 0.14 * len(prune_layers)))
    for number, layer in enumerate(prune_layers):
        late = layer > len(shares) / 2
        axes.axvline(layer - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.annotate(
            f"tokens leave before layer {layer}",
            (layer - 0.5, top * (1.08 + 0.14 * (len(prune_layers) - number))),
            (-5 if late else 5, -1),
            textcoords="offset points",
            ha="right" if late else "left",
            va="top",
        )
    _layer_axis(axes, len(shares))
    axes.set_ylabel("sensitivity, %")
    return _svg(figure, "sensitivity", "share of the sensitivity by decoder layer")


@_styled
def difference_plot(by_layer: Sequence[float], tolerance: float) -> str:
    """SVG of the largest difference to the reference after each decoder layer, on a log axis that ends at a floor."""
    figure, axes = _axes(7.2, 2.3)
    floor = min([value for value in (*by_layer, tolerance) if value > 0], default=1e-3) / 3
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.6, max([floor, tolerance, *by_layer]) * 4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.minorticks_off()
    axes.axhline(max(tolerance, floor), color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "tolerance",
        (1, max(tolerance, floor)),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=MUTED,
    )
    axes.plot(
        range(len(by_layer)),
        [max(value, floor) for value in by_layer],
        color=PROBE,
        linewidth=1.2,
        marker="o",
        markersize=4,
    )
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


def _axes(width: float, height: float, right: float = 0.99) -> tuple[Any, Any]:
    """A figure of that many inches and its axes; ``right`` leaves room for labels beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_axes((0.1, 0.5 / height, right - 0.1, 1 - 0.6 / height))


def _keep_axis(axes: Any, keeps: Sequence[float]) -> None:
    """Keep ratio on x, halving to the right; ``keeps`` (descending) get ticks where there is room."""
    axes.set_xscale("log", base=2)
    low, high = min(keeps), max(keeps)
    if low == high:
        low = high / 2
    pad = (high / low) ** 0.04
    axes.set_xlim(high * pad, low / pad)
    ticks: list[float] = []
    for keep in keeps:
        if not ticks or math.log(ticks[-1] / keep) > 0.08 * math.log(high / low):
            ticks.append(keep)
    axes.set_xticks(ticks, [_percent(keep) for keep in ticks])
    axes.minorticks_off()
    axes.set_xlabel("prompt tokens kept")


def _layer_axis(axes: Any, layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, max(layers, 1) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set_xlabel("decoder layer")


def _label_ends(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Name each line beside its last point (name, y, x, colour); names are moved apart and led back to their lines."""
    bottom, top = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    gap, places = 0.07, [(y - bottom) / (top - bottom) for _, y, _, _ in ends]
    for _ in range(100):  # push neighbours apart by equal parts until all fit
        for at in range(1, len(places)):
            push = max(0.0, gap - (places[at] - places[at - 1])) / 2
            places[at - 1], places[at] = places[at - 1] - push, places[at] + push
        places = [min(max(place, gap * at), 1 - gap * (len(places) - 1 - at)) for at, place in enumerate(places)]
    for (name, y, x, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            visible(name),
            (1 if name == "dense" else x, y),
            (1.04, place),
            va="center",
            annotation_clip=False,
            xycoords=axes.get_yaxis_transform() if name == "dense" else "data",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1},
            color=PROBE if name == "probe" else INK,
            weight="bold" if name == "probe" else "normal",
        )


def _svg(figure: Any, name: str, label: str) -> str:
    """A figure as one ``svg`` element that sizes itself to the page; ids start with ``name``, unused ones go."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r'\A<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 {NAMESPACES} role="img">', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    start = text.index(">") + 1
    return f"{text[:start]}<title>{Markup.escape(label)}</title>{text[start:]}"


def _not_finite(value: Any, place: str = "") -> str:
    """Where in nested data the first number is that is NaN or infinite, such as ``dense.by_layer.3``; "" if none is."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_not_finite(part, f"{place}.{key}".lstrip(".")) for key, part in parts)
    return next((one for one in found if one), "")


def _percent(share: float) -> str:
    """0.125 -> "12.5 %", three digits at most and no more than two decimals."""
    value = round(share * 100, 2) or 0.0
    return f"{value:,.0f} %" if abs(value) >= 100 else f"{value:.3g} %"


def _typeset(text: str) -> str:
    """Real minus signs, and no line break before a unit."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return re.sub(r"(?<=\d) (?=%|[kMG]?i?B\b|min\b|s\b|ms\b)", "\u00a0", text)


def _size(count: int) -> str:
    """Bytes in the largest binary unit that keeps the number above 1."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
