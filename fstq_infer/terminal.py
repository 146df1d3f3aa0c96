"""Standard output and standard error as the commands use them: text for people, JSON for programs. Knows no command.

Results go to :data:`out`, everything else to :data:`notes`. In a pipe or file no line is wrapped.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from rich.console import Console

from fstq_infer.errors import PromptError

PLAIN_WIDTH = 160  # columns that a table may take where there is no terminal; COLUMNS overrides
LARGEST_INPUT = 16 << 20  # bytes of a prompt on standard input
PIPE_CLOSED = 141  # 128 + SIGPIPE: what a shell reports of any program whose reader has gone


class Terminal(Console):
    """A console that never breaks lines itself."""

    def __init__(self, stderr: bool = False, markup: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        wide = "COLUMNS" not in os.environ and not (stream and stream.isatty())
        width = PLAIN_WIDTH if wide else None
        super().__init__(stderr=stderr, highlight=False, markup=markup, soft_wrap=True, width=width)

    def data(self, value: Any) -> None:
        """One JSON object; letters that the output's encoding may lack are escaped."""
        self.print_json(data=value, ensure_ascii=not self.encoding.lower().startswith("utf"))

    @property
    def styled(self) -> bool:
        """Whether styles such as struck out reach the reader."""
        return self.is_terminal and self.color_system is not None


def prepare() -> None:
    """Streams that can be used: closed ones (``>&-``) lead nowhere, letters that an encoding lacks are escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def standard_input() -> str:
    """All of standard input, which is UTF-8 whatever the locale says. Raises PromptError."""
    data = sys.stdin.buffer.read(LARGEST_INPUT + 1)
    if len(data) > LARGEST_INPUT:
        raise PromptError(f"standard input has more than {LARGEST_INPUT} bytes; a prompt that long fits no model")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def argument(text: str) -> str:
    """An argument of the command line, read as UTF-8 where the locale could not decode it."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\udc80" <= letter <= "\udcff" for letter in text) else text
    except UnicodeError:
        return text


def discard() -> None:
    """Point standard output at nothing, so that flushing it at the end cannot fail again."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, sys.stdout.fileno())
    except (OSError, ValueError):  # no real file: a test's buffer
        pass
    finally:
        os.close(nothing)


out = Terminal()
notes = Terminal(stderr=True)
