"""``fstq plan`` and ``fstq doctor``: what is known of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fstq_infer.cli import complete
from fstq_infer.cli.options import Json, examples, ratios_of
from fstq_infer.cli.root import app
from fstq_infer.lazy import load


@app.command(
    epilog=examples(
        "fstq plan my.bundle --device orin-nano --prompt-tokens 2048 --precision int4-128",
        "fstq plan my.bundle --device all --json",
    )
)
def plan(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's directory.", show_default=False)] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="A device's name, 'all', or a profile's file; several times for several; default: this one.",
            autocompletion=complete.planned,
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Power mode, such as 15W; default: the profile's.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    keep: Annotated[
        str | None, typer.Option(help="Keep ratios beside dense, with commas; default: the bundle's.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="As if all matrices were stored in this format; default: as they are.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the model with published speeds instead.")] = False,
    json: Json = False,
) -> None:
    """Predict memory, time to first token and tokens/s on a Jetson, dense and pruned, from a roofline."""
    code = load("fstq_infer.forecast:plan", "fstq plan", "ort")(
        bundle,
        devices=device or [],
        mode=mode,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        keeps=None if keep is None else ratios_of(keep),
        precision=precision,
        check=check,
        json=json,
    )
    raise typer.Exit(code)


@app.command(epilog=examples("fstq doctor", "fstq doctor --record machine.json"))
def doctor(
    json: Json = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write what was read (files, commands, packages) to this file, for a report."),
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="Judge such a record instead of this machine.")] = None,
) -> None:
    """Look for what would make inference fail or slow here, and say what to do. Exit code 1: something is broken."""
    raise typer.Exit(
        load("fstq_infer.doctor.command:doctor", "fstq doctor", "ort")(json=json, record=record, replay=replay)
    )
