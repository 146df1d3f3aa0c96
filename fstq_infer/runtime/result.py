"""What a generation gives back: the text, the tokens, what was pruned, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fstq_infer.errors import OptionError


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, up to this row's last token; rows of a batch run together. A stream's reader's own time is left out.

    prefill_s: in the engine, for the prompt. time_to_first_token_s: from the call on, tokenisation included.
    decode_s: from the first token to the last. backend_s: in the engine altogether. tokens: generated, first included.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    time_to_first_token_s: float = 0.0
    backend_s: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, without the first token (the prefill made it); 0 for less than two tokens."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def overhead_per_token_s(self) -> float:
        """Seconds spent outside the engine for each decoded token; 0 for less than two tokens."""
        if self.tokens < 2:
            return 0.0
        return max(0.0, self.decode_s - (self.backend_s - self.prefill_s)) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Result:
    """One generated text.

    text: without the EOS token or the stop string. tokens: all generated ids, the ending one included.
    prompt_tokens: ids of the whole prompt; the first ``cached_tokens`` of them were in a session's cache already.
    kept: ascending indices into ``prompt_tokens`` that stayed after the last pruning stage; all when dense.
    finish: "eos", "stop" (a stop string) or "length" (max_tokens, or the end of the context).
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    kept: tuple[int, ...]
    finish: str
    timings: Timings
    cached_tokens: int = 0


class Stream(Iterator[str]):
    """Pieces of one text while it is generated; :attr:`result` once they have all been read."""

    __slots__ = ("_finish", "_pieces", "_result")

    def __init__(self, pieces: Iterator[str], finish: Callable[[], Result]) -> None:
        """finish: called once, when the pieces have come to their regular end."""
        self._pieces: Iterator[str] | None = pieces
        self._finish = finish
        self._result: Result | None = None

    def __next__(self) -> str:
        if self._pieces is None:
            raise StopIteration
        pieces, self._pieces = self._pieces, None  # an error or an interrupt on the way ends the stream
        for piece in pieces:
            self._pieces = pieces
            return piece
        self._result = self._finish()
        raise StopIteration

    def close(self) -> None:
        """Give the generation up; nothing more is computed."""
        self._pieces = None

    @property
    def result(self) -> Result:
        """Raises OptionError while the stream has not been read to its end, or when it was broken off."""
        if self._result is None:
            raise OptionError("the stream's result is there once the stream has been read to its end; it has not been")
        return self._result


class Clock:
    """A stopwatch that runs while this package works, and remembers how long the engine took."""

    __slots__ = ("_backend", "_before", "_first", "_prefill", "_since")

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = time.perf_counter()
        self._backend = 0.0
        self._prefill = 0.0
        self._first = 0.0

    def pause(self) -> None:
        """The caller's time begins."""
        self._before, self._since = self._elapsed(), None

    def resume(self) -> None:
        """The caller's time ends; without effect on a running clock."""
        if self._since is None:
            self._since = time.perf_counter()

    def backend(self, seconds: float) -> None:
        """Count one engine call; the first one is the prefill."""
        self._backend += seconds
        self._prefill = self._prefill or seconds

    def token(self) -> None:
        """A token is there for each row; the first call notes the time."""
        self._first = self._first or self._elapsed()

    def read(self, tokens: int) -> Timings:
        """Timings of a row with ``tokens`` tokens that ends now."""
        total = self._elapsed()
        return Timings(self._prefill, total - self._first, total, self._first, self._backend, tokens)

    def _elapsed(self) -> float:
        return self._before if self._since is None else self._before + time.perf_counter() - self._since
