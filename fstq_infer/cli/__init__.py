"""The command line, ``fstq``. A command checks nothing itself: it hands over to its module, imported when it runs."""

from __future__ import annotations

import logging
import sys

from fstq_infer.cli import adapters, engines, exporting, federated, machines
from fstq_infer.cli.root import app
from fstq_infer.errors import FstqError
from fstq_infer.terminal import PIPE_CLOSED, discard, notes, prepare

__all__ = ["adapters", "app", "engines", "exporting", "federated", "machines", "main"]
_log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns errors into one line and an exit code (docs/exit-codes.md)."""
    prepare()
    code: object = 1
    try:
        app(arguments, prog_name="fstq", standalone_mode=True)
    except SystemExit as done:
        # rich and typer both end with 1 when the reader of a pipe has gone
        code = PIPE_CLOSED if isinstance(done.__context__, BrokenPipeError) else done.code
    except FstqError as error:
        _failed(str(error), error)
    except MemoryError as error:
        _failed("the memory of this machine or process does not suffice; see 'fstq plan' and 'fstq doctor'", error)
    except OSError as error:  # a full disk, a place that may not be written: not foreseen, but not ours either
        _failed(f"the operating system refused: {error}", error)
    sys.exit(_flushed(code))  # type: ignore[arg-type]


def _failed(message: str, error: BaseException) -> None:
    _log.info("where the error comes from", exc_info=error)
    notes.print("error", style="bold red", end=": ")
    notes.print(message)


def _flushed(code: object) -> object:
    """The exit code after what was printed has left this process, or could not."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard()
        return PIPE_CLOSED
    except OSError as error:
        discard()
        _failed(f"standard output cannot be written: {error}", error)
        return 1
    return code
