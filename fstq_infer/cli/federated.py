"""``fstq fed run`` and ``fstq fed new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fstq_infer.cli.options import Json, examples
from fstq_infer.cli.root import app
from fstq_infer.lazy import load

fed = typer.Typer(no_args_is_help=True, help="Federated fine-tuning: train an adapter where the data are.")
app.add_typer(fed, name="fed")


@fed.command("run", epilog=examples("fstq fed run federation.toml --set server.rounds=20 --resume"))
def fed_run(
    config: Annotated[
        Path, typer.Argument(help="A TOML file, or a pyproject.toml with [tool.flwr.app.config].", show_default=False)
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round that was finished.")] = False,
    set: Annotated[
        list[str] | None, typer.Option(help="SECTION.KEY=VALUE in place of the file's; may be given several times.")
    ] = None,
    supernodes: Annotated[
        bool,
        typer.Option(
            "--supernodes",
            help="As across machines: a SuperLink and a SuperNode for each client, with TLS, on loopback.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a federation on this machine and save its adapter in PEFT's format."""
    load("fstq_infer.federated.app.command:run", "fstq fed", "federated")(
        config, resume=resume, changes=set or [], json=json, supernodes=supernodes
    )


@fed.command("new", epilog=examples("fstq fed new my-federation --model ./my-model --data questions.jsonl"))
def fed_new(
    folder: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder of the base model.")] = "model",
    data: Annotated[str, typer.Option(help="File of the data.")] = "data.jsonl",
) -> None:
    """Write a Flower app, for 'fstq fed run' and 'flwr run'."""
    load("fstq_infer.federated.app.command:new", "fstq fed", "federated")(folder, model=model, data=data)
