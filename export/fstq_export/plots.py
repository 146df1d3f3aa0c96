"""The report's plots as SVG text: pure functions of measured numbers, the same bytes every time. Knows no page."""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

from markupsafe import Markup

from fstq_export.wording import percent, visible
from fstq_infer.errors import MissingExtraError
from fstq_infer.fisher.scores import TARGETS

METRICS = {"exact match": ("exact", "exact match"), "nll": ("nll", "negative log-likelihood")}  # key, name on the page

# Okabe and Ito's palette, told apart with any kind of colour vision. Each becomes a CSS variable with itself as the
# fallback, so that the page can lighten a colour on a dark ground and a plot still stands alone.
INK, MUTED, PROBE, BEST, REFERENCE = "#1b1e23", "#666b73", "#0072b2", "#d55e00", "#009e73"
VARIABLES = {INK: "ink", MUTED: "muted", PROBE: "probe", BEST: "best", REFERENCE: "reference"}
DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (9, 2)), (0, ()))

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
    dense, scale, sign = calibration["dense"][key], 100 if key == "exact" else 1, -1 if key == "exact" else 1
    chosen = calibration["chosen"]
    figure, (axes,) = _axes(7.2, 4.2, right=0.79)
    limit = dense * (1 + sign * calibration["max_quality_drop"])
    axes.axhspan(dense * scale, limit * scale, color=PROBE, alpha=0.15, linewidth=0)
    if chosen is not None:
        low, high = sorted(dense * (1 + sign * drop) * scale for drop in chosen["interval"])
        high = min(high, 100) if key == "exact" else high
        axes.plot([chosen["keep"]] * 2, [low, high], color=INK, linewidth=1, marker="_", markersize=7, zorder=5)
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
    _curves(axes, curves(calibration, scale), dense * scale, sign < 0, [chosen["keep"]] if chosen else [])
    axes.set_ylabel(f"{name}, %" if key == "exact" else f"{name} (lower is better)", parse_math=False)
    return _svg(figure, "quality", f"{name} against the share of prompt tokens kept")


@_styled
def quality_panels(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG of exact match over the keep ratio, a panel for every model and prompt length, the probe's intervals drawn.

    rows: model, tokens, scorer, keep, exact, low, high, dense; the last four as shares of the items.
    """
    panels: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["model"], row["tokens"]), []).append(row)
    figure, places = _axes(4.6, 3.1, right=0.72, top=0.35, count=len(panels))
    for axes, ((model, tokens), measured) in zip(places, panels.items(), strict=True):
        lines: dict[str, dict[float, float]] = {}
        for row in measured:
            lines.setdefault(row["scorer"], {})[row["keep"]] = row["exact"] * 100
        ours = [row for row in measured if row["scorer"] == "probe"]
        axes.vlines(
            [row["keep"] for row in ours],
            [row["low"] * 100 for row in ours],
            [row["high"] * 100 for row in ours],
            color=PROBE,
            linewidth=1,
        )
        _curves(axes, lines, measured[0]["dense"] * 100, True)
        axes.set_ylabel("exact match, %")
        axes.set_title(visible(f"{model}, prompts of {tokens:,} tokens"), loc="left", fontsize=9, color=INK)
    return _svg(figure, "panels", "exact match against the share of prompt tokens kept, by model and prompt length")


def curves(calibration: dict[str, Any], scale: float = 1) -> dict[str, dict[float, float]]:
    """A calibration's metric by scorer and keep ratio, times ``scale``."""
    key, _ = METRICS[calibration["metric"]]
    return {
        scorer: {point["keep"]: point[key] * scale for point in points}
        for scorer, points in calibration["curves"].items()
    }


def best_baseline(lines: Mapping[str, Mapping[float, float]], higher: bool) -> str | None:
    """The strategy other than the probe and the references that is best on average over the ratios all have."""
    rivals = {name: line for name, line in lines.items() if name not in ("probe", *TARGETS)}
    shared = set.intersection(*(set(line) for line in rivals.values())) if rivals else set()
    if not shared:
        return None
    return (max if higher else min)(rivals, key=lambda name: sum(rivals[name][keep] for keep in shared))


@_styled
def sensitivity_plot(shares: Sequence[float], prune_layers: Sequence[int]) -> str:
    """SVG of each decoder layer's share of the sensitivity (they sum to 1), prune layers marked."""
    figure, (axes,) = _axes(7.2, 2.5)
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
def formats_plot(groups: Sequence[Mapping[str, Any]]) -> str:
    """SVG of the bits per weight of each group of weights, a bar each in the model's order, coloured by format.

    groups: name, format, bits. Bars of one decoder layer stand together, named by its number.
    """
    figure, (axes,) = _axes(7.2, 2.8, top=0.35)
    layers = [next((part for part in group["name"].split(".") if part.isdigit()), None) for group in groups]
    places: list[float] = []
    ticks: dict[str, list[float]] = {}
    for number, (group, layer) in enumerate(zip(groups, layers, strict=True)):
        gap = 0.0 if number == 0 else 1.0 if layer is not None and layer == layers[number - 1] else 1.8
        places.append(places[-1] + gap if places else 0.0)
        name = layer if layer is not None else visible(group["name"].rpartition(".")[2])
        ticks.setdefault(name, []).append(places[-1])
    colours = {"int4": PROBE, "int8": BEST}
    for kind in dict.fromkeys(group["format"] for group in groups):
        mine = [number for number, group in enumerate(groups) if group["format"] == kind]
        axes.bar(
            [places[n] for n in mine],
            [groups[n]["bits"] for n in mine],
            0.86,
            color=colours.get(kind.partition("-")[0], REFERENCE),
            alpha={"int4-64": 0.7, "int4-128": 0.45, "int4-128-dynamic": 0.3, "int8-dynamic": 0.6}.get(kind, 1.0),
            linewidth=0,
            label=kind,
        )
    shown = list(ticks.items())[:: max(1, len(ticks) // 24)]
    axes.set_xticks([sum(at) / len(at) for _, at in shown], [name for name, _ in shown])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-1, (places[-1] if places else 0) + 1)
    axes.set_xlabel("embedding, decoder layers, head: groups of weights in the model's order")
    axes.set_ylabel("bits per weight")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, handlelength=1, borderaxespad=0)
    return _svg(figure, "formats", "bits per weight of each group of weights")


@_styled
def difference_plot(by_layer: Sequence[float], tolerance: float) -> str:
    """SVG of the largest difference to the reference after each decoder layer, on a log axis that ends at a floor."""
    figure, (axes,) = _axes(7.2, 2.3)
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


@_styled
def before_after_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG of exact answers before and after an adapter: a panel for each kind of question, a pair of bars for each row.

    rows: ``weights``, ``keep`` and shares named ``KIND_before`` and ``KIND_after``, KIND being domain or known.
    """
    figure, panels = _axes(0.9 * len(rows) + 1.2, 3.2, top=0.45, count=2)
    names = [f"{row['weights']}\n{'dense' if row['keep'] == 1 else format(row['keep'], '.0%')}" for row in rows]
    for axes, (kind, title) in zip(panels, (("domain", "new domain"), ("known", "known languages")), strict=True):
        for shift, when, colour in ((-0.2, "before", MUTED), (0.2, "after", PROBE)):
            heights = [100 * row[f"{kind}_{when}"] for row in rows]
            places = [number + shift for number in range(len(rows))]
            bars = axes.bar(places, heights, 0.38, color=colour, label=f"{when} the adapter")
            axes.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=7)
        axes.set(ylim=(0, 112), ylabel="exact answers, %", title=title)
        axes.set_xticks(range(len(rows)), names)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.2), frameon=False, ncols=2)
    return _svg(figure, "loop", "exact answers before and after the adapter")


def _axes(width: float, height: float, right: float = 0.99, top: float = 0.1, count: int = 1) -> tuple[Any, list[Any]]:
    """A figure of ``count`` axes, two in a row, ``width`` times ``height`` inches each.

    right: where the axes end, leaving room for labels beside them; top: inches above them.
    """
    from matplotlib.figure import Figure

    columns, rows, left = min(2, count), -(-count // 2), 0.68 / width
    figure = Figure(figsize=(width * columns, height * rows))
    shape = (right - left) / columns, (1 - (0.5 + top) / height) / rows
    corners = [((n % 2 + left) / columns, (rows - 1 - n // 2 + 0.5 / height) / rows) for n in range(count)]
    return figure, [figure.add_axes((*corner, *shape)) for corner in corners]


def _curves(
    axes: Any, lines: Mapping[str, Mapping[float, float]], dense: float, higher: bool, keeps: Sequence[float] = ()
) -> None:
    """Draw and name a line per scorer (keep ratio -> value): the probe bold, the best baseline marked, the rest thin.

    keeps: ratios that get a tick besides those of the lines.
    """
    best = best_baseline(lines, higher)
    ends = [("dense", 1.0, dense, dense, MUTED)]
    axes.axhline(dense, color=MUTED, linewidth=1)
    rest = sorted(set(lines) - {"probe", best, *TARGETS})
    for scorer, values in lines.items():
        # Keeping everything is the dense model whatever the scorer, so every line starts there.
        line = sorted({1.0: dense, **values}.items(), reverse=True)
        style: dict[str, Any] = {"color": MUTED, "linewidth": 0.7}
        if scorer == "probe":
            style = {"color": PROBE, "linewidth": 2.6, "marker": "o", "markersize": 5, "zorder": 4}
        elif scorer == best:
            style = {"color": BEST, "linewidth": 1.5, "marker": "D", "markersize": 3.5, "zorder": 3}
        elif scorer in TARGETS:
            style = {"color": REFERENCE, "linewidth": 0.9, "linestyle": DASHES[TARGETS.index(scorer)]}
        else:
            style["linestyle"] = DASHES[rest.index(scorer) % len(DASHES)]
        x, y = [keep for keep, _ in line], [value for _, value in line]
        axes.plot(x, y, **style)
        ends.append((scorer, x[-1], y[-1], sum(y) / len(y), style["color"]))
    axes.margins(y=0.08)
    if higher:
        axes.set_ylim(max(axes.get_ylim()[0], -3))
    _keep_axis(axes, sorted({1.0, *keeps, *(keep for values in lines.values() for keep in values)}, reverse=True))
    _label_ends(axes, ends, best)


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


def _label_ends(axes: Any, ends: Sequence[tuple[str, float, float, float, str]], best: str | None) -> None:
    """Name each line (name, last x, last y, mean y, colour) beside its end; names are moved apart and led back."""
    bottom, top = axes.get_ylim()
    gap, ends = min(0.062, 1 / len(ends)), sorted(ends, key=lambda end: end[2])
    # From bottom to top; lines that meet in the end are named in the order that they had before.
    apart = (later[2] - end[2] > gap / 2 * (top - bottom) for end, later in itertools.pairwise(ends))
    groups = itertools.accumulate(apart, initial=0)
    ends = [end for _, end in sorted(zip(groups, ends, strict=True), key=lambda pair: (pair[0], pair[1][3]))]
    places = [(y - bottom) / (top - bottom) for _, _, y, _, _ in ends]
    for _ in range(100):  # push neighbours apart by equal parts until all fit
        for at in range(1, len(places)):
            push = max(0.0, gap - (places[at] - places[at - 1])) / 2
            places[at - 1], places[at] = places[at - 1] - push, places[at] + push
        places = [min(max(place, gap * at), 1 - gap * (len(places) - 1 - at)) for at, place in enumerate(places)]
    for (name, x, y, _, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            visible(name),
            (1 if name == "dense" else x, y),
            (1.05, place),
            va="center",
            annotation_clip=False,
            xycoords=axes.get_yaxis_transform() if name == "dense" else "data",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1}
            | {"relpos": (0, 0.5)},  # from the name's left edge
            color=colour,
            weight="bold" if name in ("probe", best) else "normal",
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
