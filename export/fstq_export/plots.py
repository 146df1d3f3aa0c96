"""The report's plots as SVG text: pure functions of measured numbers, the same bytes every time. Knows no page."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from markupsafe import Markup

from fstq_export.wording import percent, visible
from fstq_infer.errors import MissingExtraError

METRICS = {"exact match": ("exact", "exact match"), "nll": ("nll", "negative log-likelihood")}  # key, name on the page

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
    axes.set_xticks(ticks, [percent(keep) for keep in ticks])
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
