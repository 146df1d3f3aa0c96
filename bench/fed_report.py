"""From the runs of bench/federated.py to results/federated.json and two pictures: loss over bytes and over time.

Learning rates and our methods' settings were chosen on seed TUNED: rows say it, and targets are of the other seeds.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, target, write
from fed_methods import METHODS

IMAGES = RESULTS.parents[1] / "docs" / "images"
DENSE, OURS, FAMILY, TUNED = "fedavg", "mosaic-swift", "mosaic", 0
DRAWN = 10  # clients of a round, unless a label says otherwise
SHARES = {"at_60": 0.6, "at_95": 0.95}
FIGURES = ("rounds", "bytes", "down", "seconds", "joules")
Run = dict[str, Any]
Runs = dict[str, dict[int, list[Run]]]  # method -> seed -> runs, one for each rate
Aims = dict[int, dict[str, float]]  # seed -> share -> loss


def report(folder: Path) -> None:
    """Write what can be said of the runs so far; runs that are not finished count with the rounds they have."""
    settings: dict[tuple[str, str], Runs] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        given = run["setting"]
        settings[_label(given)].setdefault(given["method"], {}).setdefault(given["seed"], []).append(run)
    rows, figures, curves = list[Run](), dict[str, dict[str, Any]](), dict[str, dict[str, list[Run]]]()
    for (setting, trouble), runs in sorted(settings.items()):
        whole = settings.get((setting, ""), {}).get(DENSE)
        if not whole:
            print(f"skipped: {setting}{trouble}, in which {DENSE} was not run")
            continue
        dense = _best(whole)
        found, chosen = _rows(setting + trouble, runs, dense)
        rows += found
        figures |= _troubled(setting + trouble, found) if trouble else _targets(setting, found)
        if not trouble and len(chosen) > 2:
            curves[setting] = chosen
    write("federated", "python bench/federated.py", rows, figures)
    if curves:
        _plot(curves, "bytes", "uplink of all clients, bytes", IMAGES / "federated-bytes.svg")
        _plot(curves, "seconds", "time, seconds", IMAGES / "federated-time.svg")


def _label(given: Mapping[str, Any]) -> tuple[str, str]:
    """(what a run shares with its dense baseline, what went wrong on top). Where more drop out, more may be asked."""
    trouble = f", dropout {given['dropout']:g}" * (given["dropout"] != 0.1)
    trouble += f", lost {given['loss']:g}" * (given["loss"] > 0)
    asked = f", {given['drawn']} asked" * (given["drawn"] != DRAWN)
    base = f"{given['task']}, {given['clients']} clients, {given['steps']} steps, {given['network']}"
    return (base, trouble + asked) if trouble else (base + asked, "")


def reached(rounds: Sequence[Mapping[str, Any]], loss: float) -> Run | None:
    """Rounds, bytes, seconds and joules until a loss is first reached; interpolated between evaluations."""
    for before, after in itertools.pairwise(rounds):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            at = {name: before[name] + share * (after[name] - before[name]) for name in FIGURES[1:]}
            return {"rounds": before["round"] + share, **at}
    return None


def _rows(label: str, runs: Runs, dense: dict[int, Run]) -> tuple[list[Run], dict[str, list[Run]]]:
    """Two rows for each method, of the seed that settings were chosen on and of the others; and its runs."""
    aims: Aims = {}
    for seed, run in dense.items():
        losses = [one["loss"] for one in run["rounds"]]
        aims[seed] = {name: losses[0] - share * (losses[0] - min(losses)) for name, share in SHARES.items()}
    chosen, rows = {method: _best(seeds) for method, seeds in runs.items()}, list[Run]()
    for tuned in (True, False):
        for method, every in chosen.items():
            seeds = {seed: run for seed, run in every.items() if (seed == TUNED) == tuned and seed in aims}
            if seeds:
                rates = sorted({run["setting"]["rate"] for found in runs[method].values() for run in found})
                rows.append(_row(label, method, seeds, dense, aims) | {"tuned_on": tuned, "rates_tried": rates})
    return rows, {method: list(seeds.values()) for method, seeds in chosen.items()}


def _row(label: str, method: str, seeds: dict[int, Run], dense: dict[int, Run], aims: Aims) -> Run:
    ends = [run["rounds"][-1] for run in seeds.values()]
    messages = sum(one["messages"] for run in seeds.values() for one in run["rounds"])
    row: Run = {
        "setting": label,
        "method": method,
        "about": METHODS[method].about if method in METHODS else "",
        "seeds": sorted(seeds),
        "rate": next(iter(seeds.values()))["setting"]["rate"],
        "rounds_run": min(one["round"] for one in ends),
        "last_loss": round(sum(one["loss"] for one in ends) / len(ends), 4),
        "bytes_of_a_message": round(sum(one["bytes"] for one in ends) / max(messages, 1)),
    }
    for name in SHARES:
        mine = {seed: reached(run["rounds"], aims[seed][name]) for seed, run in seeds.items()}
        whole = {seed: reached(dense[seed]["rounds"], aims[seed][name]) for seed in seeds}
        row[name] = _ratios(list(mine.values()), list(whole.values()))
        if len(seeds) > 1:
            row[f"{name}_by_seed"] = {seed: _ratios([mine[seed]], [whole[seed]]) for seed in sorted(seeds)}
    return row


def _ratios(mine: Sequence[Run | None], dense: Sequence[Run | None]) -> Run | None:
    """Mean figures beside dense's; None where a run does not reach the loss."""
    if any(one is None for one in (*mine, *dense)):
        return None
    own, whole = ({key: sum(one[key] for one in runs if one) / len(runs) for key in FIGURES} for runs in (mine, dense))
    return {
        **{figure: round(own[figure], 3) for figure in FIGURES},
        "uplink_times_smaller": round(whole["bytes"] / own["bytes"], 2),
        "times_the_rounds": round(own["rounds"] / whole["rounds"], 3),
        "time_saved": round(1 - own["seconds"] / whole["seconds"], 3),
    }


def _best(seeds: dict[int, list[Run]]) -> dict[int, Run]:
    """For each seed the run with the rate that was best, by its lowest loss, on the first seed."""
    first = min(seeds[min(seeds)], key=lambda run: min(one["loss"] for one in run["rounds"]))
    rate = first["setting"]["rate"]
    return {seed: run for seed, found in seeds.items() for run in found if run["setting"]["rate"] == rate}


def _targets(label: str, rows: list[Run]) -> dict[str, dict[str, Any]]:
    """Of our method: on seeds that nothing was chosen on, where it was run."""
    figures = dict[str, dict[str, Any]]()
    mine = [row for row in rows if row["method"] == OURS]
    for row in sorted(mine, key=lambda row: row["tuned_on"])[:1]:
        seeds = "seeds " + ", ".join(map(str, row["seeds"])) + " (chosen on)" * row["tuned_on"]
        for share in SHARES:
            at, others = row[share], [
                other[share]
                for other in rows
                if other["tuned_on"] == row["tuned_on"] and not other["method"].startswith(FAMILY) and other[share]
            ]  # fmt: skip
            what = f"{label}: {OURS}, {share[3:]} % of dense's improvement, {seeds}"
            figures[f"{what}, uplink times smaller"] = target(at["uplink_times_smaller"] if at else 0.0, 46)
            figures[f"{what}, times the rounds"] = target(at["times_the_rounds"] if at else 99.0, 1.5, at_least=False)
            figures[f"{what}, time saved"] = target(at["time_saved"] if at else -1.0, 0.75)
            for figure in ("bytes", "seconds"):
                ahead = min((other[figure] for other in others), default=0.0) / at[figure] if at else 0.0
                figures[f"{what}, {figure} of the best of {len(others)} others over ours"] = target(ahead, 1.0)
    return figures


def _troubled(label: str, rows: list[Run]) -> dict[str, dict[str, Any]]:
    """Whether the loss that dense reaches without dropouts and losses is reached with them."""
    found = dict[str, dict[str, Any]]()
    for row in rows:
        for share in SHARES:
            what = f"{label}: {row['method']}, seeds {', '.join(map(str, row['seeds']))}"
            found[f"{what}, reaches {share[3:]} % of undisturbed dense's improvement"] = target(
                float(bool(row[share])), 1
            )
    return found


def _plot(curves: dict[str, dict[str, list[Run]]], axis: str, title: str, path: Path) -> None:
    """Means over the seeds of each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(curves), 4.6), layout="constrained")
    for axes, (label, methods) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for method, runs in sorted(methods.items()):
            rounds = list(zip(*(run["rounds"][1:] for run in runs), strict=False))
            points = [[sum(one[key] for one in seeds) / len(seeds) for seeds in rounds] for key in (axis, "loss")]
            axes.plot(*points, label=method, linewidth=2.4 if method in (OURS, DENSE) else 1.1)
        axes.set(xscale="log", xlabel=title, ylabel="held-out loss per token", title=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
