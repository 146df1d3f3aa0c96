"""``fstq adapter add``, ``list`` and ``remove``."""

from __future__ import annotations

from typing import Annotated

import typer

from fstq_infer.cli import complete
from fstq_infer.cli.options import Bundle, Json, examples
from fstq_infer.cli.root import app
from fstq_infer.lazy import load

adapters = typer.Typer(no_args_is_help=True, help="Adapters (LoRA) of a bundle: add, list, remove.")
app.add_typer(adapters, name="adapter")


@adapters.command("add", epilog=examples("fstq adapter add my.bundle ./medical"))
def adapter_add(
    bundle: Bundle,
    folder: Annotated[str, typer.Argument(help="A LoRA adapter's folder (PEFT), or NAME=FOLDER.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name in the bundle; default: the folder's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter of that name.")] = False,
    json: Json = False,
) -> None:
    """Check an adapter and put it into a bundle; engines that are built stay valid."""
    load("fstq_infer.adapters.command:add", "fstq adapter", "ort")(bundle, folder, name=name, force=force, json=json)


@adapters.command("list", epilog=examples("fstq adapter list my.bundle"))
def adapter_list(bundle: Bundle, json: Json = False) -> None:
    """Show a bundle's adapters."""
    load("fstq_infer.adapters.command:show", "fstq adapter", "ort")(bundle, json=json)


@adapters.command("remove", epilog=examples("fstq adapter remove my.bundle medical"))
def adapter_remove(
    bundle: Bundle,
    name: Annotated[
        str, typer.Argument(help="The adapter's name.", show_default=False, autocompletion=complete.adapters)
    ],
    json: Json = False,
) -> None:
    """Take an adapter out of a bundle."""
    load("fstq_infer.adapters.command:remove", "fstq adapter", "ort")(bundle, name, json=json)
