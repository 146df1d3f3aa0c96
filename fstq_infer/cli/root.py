"""The application ``fstq``, to which the modules beside this one add their commands, and its own options."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fstq_infer.terminal import notes

ORDER = ("export", "build", "run", "chat", "bench", "plan", "lint", "doctor", "demo", "adapter", "fed")
INTERRUPTED = 130  # 128 + SIGINT


class Commands(TyperGroup):
    """Lists commands in the order of a newcomer's steps; Ctrl-C ends any of them with one word and exit code 130."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names; those that ORDER lacks come last."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the command line; --help and --version print here."""
        with _quiet_ends():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with _quiet_ends():
            return super().invoke(ctx)


@contextmanager
def _quiet_ends() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        notes.print("\ninterrupted")
        raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="fstq",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Export, build and run language models with Fisher-guided token pruning.",
    epilog="Exit codes: 0 done, 1 an error that the message explains or a check that failed, 2 wrong usage, "
    "130 interrupted, 141 the reader of a pipe has gone.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from fstq_infer.versions import lines

        for line in lines():
            typer.echo(line)
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more on standard error; show where an error comes from.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print versions and exit, for a bug report.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
