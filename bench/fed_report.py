"""From the runs of bench/federated.py to results/federated.json and two pictures: loss over bytes and over time."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, target, write

IMAGES = RESULTS.parents[1] / "docs" / "images"
DENSE, OURS = "fedavg", ("mosaic", "mosaic-lean", "mosaic-fast", "mosaic-1500")
SHARES = (0.6, 0.95)
FIGURES = ("rounds", "bytes", "seconds", "joules")
Runs = dict[str, dict[int, list[dict[str, Any]]]]  # method -> seed -> runs, one for each rate


def report(folder: Path) -> None:
    """Write what can be said of the runs so far; runs that are not finished count with the rounds they have."""
    settings, rows, figures = defaultdict[str, Runs](dict), list[dict[str, Any]](), dict[str, dict[str, Any]]()
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        setting = run["setting"]
        label = f"{setting['task']}, {setting['clients']} clients, {setting['steps']} steps"
        label += f", dropout {setting['dropout']:g}" * (setting["dropout"] != 0.1)
        label += f", lost {setting['loss']:g}" * (setting["loss"] > 0) + f", {setting['network']}"
        settings[label].setdefault(setting["method"], {}).setdefault(setting["seed"], []).append(run)
    curves = {}
    for label, runs in settings.items():
        if DENSE not in runs:
            print(f"skipped: {label}, in which {DENSE} was not run")
            continue
        found, chosen = _rows(label, runs)
        rows += found
        curves[label] = chosen
        figures |= _targets(label, found)
    write("federated", "python bench/federated.py", rows, figures)
    if curves:
        _plot(curves, "bytes", "uplink of all clients, bytes", IMAGES / "federated-bytes.svg")
        _plot(curves, "seconds", "time, seconds", IMAGES / "federated-time.svg")


def reached(rounds: Sequence[Mapping[str, Any]], loss: float) -> dict[str, float] | None:
    """Rounds, bytes, seconds and joules until a loss is first reached; interpolated between evaluations."""
    for before, after in itertools.pairwise(rounds):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            at = {name: before[name] + share * (after[name] - before[name]) for name in FIGURES[1:]}
            return {"rounds": before["round"] + share, **at}
    return None


def _rows(label: str, runs: Runs) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """A row for each method, and its runs with the best rate: the lowest mean loss over the rounds of all seeds."""
    chosen = {method: _best(seeds) for method, seeds in runs.items()}
    aims = dict[int, dict[float, float]]()
    for seed, run in chosen[DENSE].items():
        losses = [one["loss"] for one in run["rounds"]]
        aims[seed] = {share: losses[0] - share * (losses[0] - min(losses)) for share in SHARES}
    dense = {share: _mean(chosen[DENSE], aims, share) for share in SHARES}
    rows = []
    for method, seeds in chosen.items():
        row: dict[str, Any] = {
            "setting": label,
            "method": method,
            "seeds": sorted(set(seeds) & set(aims)),
            "rate": next(iter(seeds.values()))["setting"]["rate"],
            "rates_tried": sorted({run["setting"]["rate"] for found in runs[method].values() for run in found}),
            "rounds_run": min(len(run["rounds"]) - 1 for run in seeds.values()),
            "last_loss": round(sum(run["rounds"][-1]["loss"] for run in seeds.values()) / len(seeds), 4),
            "bytes_of_a_message": round(
                sum(run["rounds"][-1]["bytes"] for run in seeds.values())
                / max(sum(one["messages"] for run in seeds.values() for one in run["rounds"]), 1)
            ),
        }
        for share in SHARES:
            mine, whole = _mean(seeds, aims, share), dense[share]
            name = f"at_{share:.0%}".replace("%", "")
            row[name] = None
            if mine and whole:
                row[name] = {
                    **{figure: round(mine[figure], 3) for figure in FIGURES},
                    "uplink_times_smaller": round(whole["bytes"] / mine["bytes"], 2),
                    "times_the_rounds": round(mine["rounds"] / whole["rounds"], 3),
                    "time_saved": round(1 - mine["seconds"] / whole["seconds"], 3),
                }
        rows.append(row)
    return rows, {method: list(seeds.values()) for method, seeds in chosen.items()}


def _best(seeds: dict[int, list[dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """For each seed the run with the rate that was best, by its lowest loss, on the first seed."""
    first = min(seeds[min(seeds)], key=lambda run: min(one["loss"] for one in run["rounds"]))
    rate = first["setting"]["rate"]
    return {
        seed: run for seed, found in seeds.items() for run in found if run["setting"]["rate"] == rate
    }  # fmt: skip


def _mean(
    runs: dict[int, dict[str, Any]], aims: dict[int, dict[float, float]], share: float
) -> dict[str, float] | None:
    """Means over the seeds that the dense baseline has too; None where one does not reach the loss."""
    found = [reached(runs[seed]["rounds"], aims[seed][share]) for seed in runs if seed in aims]
    if not found or any(one is None for one in found):
        return None
    return {figure: sum(one[figure] for one in found if one) / len(found) for figure in FIGURES}


def _targets(label: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    figures = {}
    for method in OURS:
        row = next((row for row in rows if row["method"] == method), None)
        for share in ("at_60", "at_95") if row else ():
            at = (row or {}).get(share)
            what = f"{label}: {method}, {share[3:]} % of dense's improvement"
            figures[f"{what}, uplink times smaller"] = target(at["uplink_times_smaller"] if at else 0.0, 46)
            figures[f"{what}, times the rounds"] = target(at["times_the_rounds"] if at else 99.0, 1.5, at_least=False)
            figures[f"{what}, time saved"] = target(at["time_saved"] if at else -1.0, 0.75)
    return figures


def _plot(curves: dict[str, dict[str, list[dict[str, Any]]]], axis: str, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(curves), 4.6), layout="constrained")
    for axes, (label, methods) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for method, runs in sorted(methods.items()):
            rounds = runs[0]["rounds"][1:]
            wide = 2.4 if method in (*OURS, DENSE) else 1.1
            axes.plot([one[axis] for one in rounds], [one["loss"] for one in rounds], label=method, linewidth=wide)
        axes.set(xscale="log", xlabel=title, ylabel="held-out loss per token", title=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
