"""The README's pictures as SVG: quality over keep ratio from results/quality.json, one prompt from a bundle's report.

python bench/plots.py BUNDLE      a few seconds; writes docs/images/quality.svg and docs/images/prompt.svg
"""

from __future__ import annotations

import argparse
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS
from fstq_export.plots import INK, MUTED, quality_panels
from fstq_export.report import LEVELS, heat_map
from fstq_export.wording import visible
from markupsafe import escape

from fstq_infer.fisher.scores import BASELINES

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLUMNS, CELL, LINE, EDGE = 100, 7.2, 21, 14  # characters in a line; pixels: width of a character, height, margin
HEAT = "#e69f00"
SHOWN = ("probe", *BASELINES)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle that was exported with calibration data")
    parser.add_argument("--quality", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--out", type=Path, default=IMAGES)
    given = parser.parse_args(arguments)
    report = given.bundle / "report.json"
    if not report.exists():
        parser.error(f"there is no {report}; name a bundle, such as demo-out/model.bundle after 'make demo'")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.quality.exists():
        rows = [
            row
            for row in json.loads(given.quality.read_text(encoding="utf-8"))["rows"]
            if "exact" in row and row["scorer"] in SHOWN
        ]
        _write(given.out / "quality.svg", on_white(quality_panels(rows)))
    else:
        print(f"skipped quality.svg: there is no {given.quality}")
    calibration = json.loads(report.read_text(encoding="utf-8"))["calibration"]
    if calibration and calibration["example"]:
        _write(given.out / "prompt.svg", prompt_picture(calibration["example"]))
    else:
        print(f"skipped prompt.svg: {report} shows no prompt; the bundle was exported without calibration data")


def on_white(svg: str) -> str:
    """An SVG of its own on a white ground: its ink is dark, whatever page shows it."""
    start = svg.index("</title>") + len("</title>")
    return f'{svg[:start]}<rect width="100%" height="100%" fill="#fff"/>{svg[start:]}\n'


def prompt_picture(example: Mapping[str, Any]) -> str:
    """SVG of a prompt in a fixed-width font: shaded by score, dropped tokens struck out, the answer below."""
    heat = heat_map(dict(example))
    shades, texts, line = [], [], 0
    for line, column, width, text, row in _cells(heat["rows"]):
        x, y = EDGE + column * CELL, EDGE + line * LINE
        strength = 0.85 * (row["level"] / (LEVELS - 1)) ** 1.6  # as on the report's page
        if strength > 0.01:
            place = f'x="{x:.1f}" y="{y}" width="{width * CELL:.1f}" height="{LINE - 3}"'
            shades.append(f'<rect {place} fill-opacity="{strength:.2f}"/>')
        texts.append(_text(x, y, width, text, "" if row["kept"] else ' class="s"'))
    answer, y = f"answer: {visible(example['answer'])}", EDGE + (line + 1) * LINE + 6
    texts.append(_text(EDGE, y, _width(answer), answer, ' class="a"'))
    size = f"{COLUMNS * CELL + 2 * EDGE:.0f} {y + LINE + EDGE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
        f"<title>{heat['kept']} of {heat['count']} prompt tokens stay</title>"
        '<rect width="100%" height="100%" fill="#fff"/>'
        f"<style>text{{font:12px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:{INK}}}"
        f".s{{fill:{MUTED};text-decoration:line-through}}.a{{font-weight:bold}}</style>"
        f'<g fill="{HEAT}">{"".join(shades)}</g>{"".join(texts)}</svg>\n'
    )


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, int, str, Mapping[str, Any]]]:
    """(line, column, width, text, row) of each token; lines end before a word that does not fit, and at breaks."""
    texts = [visible(row["text"]) for row in rows]
    widths = [_width(text) for text in texts]
    line = column = 0
    for at, row in enumerate(rows):
        word = widths[at]
        if texts[at].startswith(" "):  # the tokens that follow without a space belong to the same word
            rest = itertools.takewhile(lambda i: not texts[i].startswith(" "), range(at + 1, len(rows)))
            word += sum(widths[i] for i in rest)
        if column and column + min(word, COLUMNS) > COLUMNS:
            line, column = line + 1, 0
        yield line, column, widths[at], texts[at], row
        line, column = (line + 1, 0) if row["breaks"] else (line, column + widths[at])


def _width(text: str) -> int:
    """Columns that text takes in a fixed-width font."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _text(x: float, y: float, width: int, text: str, style: str) -> str:
    shown = text.lstrip(" ")
    x, width = x + (len(text) - len(shown)) * CELL, width - (len(text) - len(shown))
    if not shown:
        return ""
    return f'<text x="{x:.1f}" y="{y + 13}" textLength="{width * CELL:.1f}"{style}>{escape(shown)}</text>'


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
