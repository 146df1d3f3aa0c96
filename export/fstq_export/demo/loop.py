"""``python -m fstq_export.demo.loop``: train an adapter across clients, put it into engines, ask before and after.

The model is the demo's; what it does not know is in domain.py. Four steps, each of them a command that a user has too:
``fstq fed run --supernodes``, ``fstq export --adapter``, ``fstq build``, ``fstq run --adapter``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fstq_export import data
from fstq_export.adapters import Wanted
from fstq_export.command import adapter_verdict, bars
from fstq_export.demo import loop_data, loop_fed
from fstq_export.demo.loop_data import Sizes
from fstq_export.demo.loop_fed import Federation
from fstq_export.demo.run import LAYER, MODEL, answer
from fstq_export.pipeline import Done, Request, export
from fstq_export.plots import before_after_plot
from fstq_export.recipe import Recipe
from fstq_export.wanted import Precision
from fstq_infer import machine
from fstq_infer.atomic import replace_file
from fstq_infer.errors import FstqError, OptionError
from fstq_infer.machine import check_threads
from fstq_infer.runtime.generate import Generator
from fstq_infer.signals import interrupted_by_sigterm

NAME, KEEPS = "domain", (1.0, 0.5, 0.25)
DROP = 0.1  # allowed of exact answers: what the held-out quarter of the calibration questions can bear out
RESULT, PLOT = "loop.json", "loop.svg"

out = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Loop:
    """What to run. bits: per weight of the second engine, 32 leaves it out; supernodes: processes of Flower."""

    sizes: Sizes = field(default_factory=Sizes)
    federation: Federation = field(default_factory=Federation)
    bits: float = 5.0
    supernodes: bool = True
    threads: int | None = None

    @property
    def formats(self) -> dict[str, Precision]:
        """Weights of each engine by name."""
        mixed = {f"{self.bits:g} bits": Precision("auto", bits=self.bits, tune=0)} if self.bits < 32 else {}
        return {"fp32": Precision(), **mixed}


def loop(folder: Path, wanted: Loop, python: Path, command: str) -> dict[str, Any]:
    """Run all of it in ``folder``; the content of loop.json. Raises FstqError subclasses."""
    began = time.monotonic()
    files = folder / "data"
    loop_data.write(files, wanted.sizes)
    out.rule(f"{wanted.federation.clients} clients, a topic each, train an adapter")
    federation = loop_fed.run(folder, MODEL, files, wanted.federation, python, wanted.supernodes)
    out.print(
        f"{federation['bytes_up']:,} bytes sent in {federation['replies']} messages; as many of FedAvg in float32 are "
        f"{federation['bytes_up_fp32']:,}: {federation['times_less']:g} times more"
    )
    rows: list[dict[str, Any]] = []
    seconds = {"federation": federation["seconds"]}
    for name, precision in wanted.formats.items():
        out.rule(f"engine with weights in {name}, adapter beside it")
        done = engine(folder / f"{name.replace(' ', '-')}.bundle", files, Path(federation["adapter"]), precision)
        seconds[f"export {name}"] = round(done.seconds, 1)
        out.print(adapter_verdict(NAME, done.report["adapters"][NAME]))
        rows += list(asked(done.path, name, files, wanted.threads))
    result = {
        "machine": machine.description(),
        "command": command,
        "settings": asdict(wanted),
        "seconds": {**seconds, "all": round(time.monotonic() - began, 1)},
        "federation": federation,
        "rows": rows,
    }
    replace_file(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    replace_file(folder / PLOT, before_after_plot(rows).encode())
    return result


def engine(bundle: Path, files: Path, adapter: Path, precision: Precision) -> Done:
    """A bundle that takes the adapter, calibrated on questions of both kinds; its engine is built when it is loaded."""
    recipe = Recipe(prune_layer=LAYER, max_quality_drop=DROP)
    request = Request(
        str(MODEL), bundle, recipe, files / loop_data.CALIBRATION, overwrite=True, precision=precision,
        adapters=Wanted({NAME: adapter}),
    )  # fmt: skip
    with bars() as progress:
        return export(request, progress)


def asked(bundle: Path, name: str, files: Path, threads: int | None) -> Iterator[dict[str, Any]]:
    """A row for each keep ratio: exact answers without and with the adapter, of the domain and of what is known."""
    generator = Generator.load(bundle, threads=threads)
    found: dict[tuple[str, str | None], Any] = {}
    for kind, file in (("domain", loop_data.DOMAIN_TEST), ("known", loop_data.KNOWN_TEST)):
        questions = [(e.prompt, e.answer) for e in data.read(files / file) if e.answer is not None]
        for adapter in (None, NAME):
            generator.set_adapter(adapter)
            keeps: Sequence[float] = KEEPS if generator.engine.stages else KEEPS[:1]
            found[kind, adapter] = {row.keep: row for row in answer(generator, questions, keeps)}
    for keep, row in found["domain", NAME].items():
        yield {
            "weights": name,
            "keep": keep,
            "domain_before": found["domain", None][keep].exact,
            "domain_after": row.exact,
            "known_before": found["known", None][keep].exact,
            "known_after": found["known", NAME][keep].exact,
            "kept": row.kept,
            "prefill_ms_before": round(found["domain", None][keep].prefill_s * 1e3, 2),
            "prefill_ms_after": round(row.prefill_s * 1e3, 2),
        }


def show(result: dict[str, Any], folder: Path) -> None:
    """The table."""
    count = result["settings"]["sizes"]["asked"]
    table = Table(title=f"exact answers through the engine, {count} unseen questions of each kind")
    for column in (
        "weights",
        "keep",
        "new domain before",
        "after",
        "known before",
        "after",
        "prompt kept",
        "prefill ms",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["weights"],
            "dense" if row["keep"] == 1 else f"{row['keep']:.0%}",
            *(f"{row[key]:.0%}" for key in ("domain_before", "domain_after", "known_before", "known_after", "kept")),
            f"{row['prefill_ms_after']:.1f}",
        )
    out.print(table)
    out.print(
        "known after: with the adapter on. Without it the engine answers as before; it can be chosen per request."
    )
    sent = result["federation"]
    out.print(
        f"uplink: {sent['bytes_up']:,} bytes in {sent['rounds']} rounds; FedAvg in float32: {sent['bytes_up_fp32']:,} "
        f"({sent['times_less']:g}x)"
    )
    out.print(f"{result['seconds']['all']:.0f} s in all; figures: {folder / RESULT}, plot: {folder / PLOT}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    sizes, federation, usual = Sizes(), Federation(), Loop()
    parser = argparse.ArgumentParser(prog="python -m fstq_export.demo.loop", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("loop-out"), help="where everything goes")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that has Flower")
    parser.add_argument("--one-process", action="store_true", help="clients in one process, without SuperNodes")
    parser.add_argument(
        "--bits", type=float, default=usual.bits, help="per weight of the second engine; 32: leave it out"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of the engines")
    for name, value in {**asdict(sizes), **asdict(federation)}.items():
        if name != "clients":  # one for each topic
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    try:
        if given["out"].exists() and not given["out"].is_dir():
            raise OptionError(f"{given['out']} is a file; name a folder with --out")
        wanted = Loop(
            Sizes(**{name: given[name] for name in asdict(sizes)}),
            Federation(**{name: given[name] for name in asdict(federation) if name != "clients"}),
            given["bits"],
            not given["one_process"],
            given["threads"],
        )
        check_threads(wanted.threads)
        command = shlex.join(
            ["python", "-m", "fstq_export.demo.loop", *(sys.argv[1:] if arguments is None else arguments)]
        )
        with interrupted_by_sigterm():
            show(loop(given["out"], wanted, given["python"], command), given["out"])
    except (FstqError, OSError) as error:
        Console(stderr=True, markup=False, soft_wrap=True).print(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
