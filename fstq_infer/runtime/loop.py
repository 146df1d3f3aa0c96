"""The generation loop: prefill, then one token per row and call. Knows the engine protocol, not what the text means.

Rows are padded on the left. A finished row is fed its last token at its last position again, and what comes out is
ignored: rows do not see each other, so it changes nothing, and the cache keeps one width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fstq_infer.runtime.engine import Engine, Step
from fstq_infer.runtime.options import Options
from fstq_infer.runtime.result import Clock, Result, Timings
from fstq_infer.runtime.sampling import Sampler
from fstq_infer.runtime.text import TextStream, Tokenizer


class Row:
    """One text being generated."""

    __slots__ = (
        "_ends", "_pieces", "_sampler", "_stops", "_text", "finish", "history", "limit", "options", "prompt", "timings"
    )  # fmt: skip

    def __init__(
        self, prompt: Sequence[int], limit: int, options: Options, tokenizer: Tokenizer, eos: frozenset[int]
    ) -> None:
        """prompt: all ids of the text so far, cached ones included. limit: most tokens to generate, >= 1."""
        special = {text: tokenizer.special_id(text) for text in options.stop}
        self.prompt = tuple(prompt)
        self.history = list(prompt)  # and the generated ids
        self.limit = limit
        self.options = options
        self.finish = ""
        self.timings = Timings()
        self._ends = eos
        # A special token such as <|im_end|> has no text: it is recognised by its id.
        self._stops = frozenset(token for token in special.values() if token is not None)
        self._sampler = Sampler(options.sampling)
        self._text = TextStream(tokenizer, [text for text, token in special.items() if token is None])
        self._pieces: list[str] = []

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.history) - len(self.prompt)

    def take(self, step: Step, row: int) -> str:
        """Draw the next token from a row of the step's logits; returns the text that it releases."""
        few = step.shortlist
        token = self._sampler(step.logits[row], self.history, few and (few[0][row], few[1][row]))
        self.history.append(token)
        if token in self._ends or token in self._stops:
            self.finish = "eos" if token in self._ends else "stop"
            piece = self._text.flush()
        else:
            piece = self._text.push(token)
            if self.generated == self.limit:
                self.finish = "length"
                piece += self._text.flush()
        if self._text.stopped:
            self.finish = "stop"
        self._pieces.append(piece)
        return piece

    def result(self, kept: Sequence[int], cached: int) -> Result:
        """The finished row's result."""
        return Result(
            text="".join(self._pieces),
            tokens=tuple(self.history[len(self.prompt) :]),
            prompt_tokens=self.prompt,
            kept=tuple(kept),
            finish=self.finish,
            timings=self.timings,
            cached_tokens=cached,
        )


class Run:
    """One batch from its prompts to its last token; read :meth:`pieces` to the end, then the rest is valid."""

    __slots__ = ("_cached", "_clock", "_engine", "_kept", "_single", "cache", "rows")

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[Row],
        clock: Clock,
        *,
        cache: Any = None,
        kept: Sequence[int] = (),
        cached: int = 0,
    ) -> None:
        """cache: of one row, to go on from; it holds the prompt's first ``cached`` ids, of which ``kept`` stayed."""
        self.rows = tuple(rows)
        self.cache = engine.empty_cache(len(self.rows)) if cache is None else cache
        self._engine = engine
        self._clock = clock
        self._cached = cached
        self._kept: list[list[int]] = [list(kept) for _ in self.rows]
        # Ids, positions and keep of every call with one token.
        self._single = tuple(np.ones((len(self.rows), width), np.int64) for width in (1, 1, len(engine.stages)))

    def pieces(self) -> Iterator[tuple[str, ...]]:
        """For each step, the text that each row releases."""
        self._clock.resume()
        step = self._prefill()
        active = list(range(len(self.rows)))
        while True:
            pieces = [""] * len(self.rows)
            for row in active:
                pieces[row] = self.rows[row].take(step, row)
            self._clock.token()
            for row in active:
                if self.rows[row].finish:
                    self.rows[row].timings = self._clock.read(self.rows[row].generated)
            active = [row for row in active if not self.rows[row].finish]
            self._clock.pause()
            yield tuple(pieces)
            if not active:
                return
            self._clock.resume()
            step = self._decode()

    def kept(self, row: int) -> list[int]:
        """Indices into the row's whole prompt that stayed after the last stage."""
        return self._kept[row]

    def result(self, row: int) -> Result:
        """The row's result."""
        return self.rows[row].result(self._kept[row], self._cached)

    def _prefill(self) -> Step:
        stages = self._engine.stages
        lengths = [len(row.prompt) - self._cached for row in self.rows]
        width = max(lengths)
        ids = np.zeros((len(self.rows), width), np.int64)
        positions = np.full((len(self.rows), width), -1, np.int64)
        for row, length in enumerate(lengths):
            ids[row, width - length :] = self.rows[row].prompt[self._cached :]
            positions[row, width - length :] = np.arange(self._cached, self._cached + length)
        keep = np.array(
            [row.options.keep(length, stages) for row, length in zip(self.rows, lengths, strict=True)], np.int64
        )
        step = self._forward(ids, positions, keep.reshape(len(self.rows), len(stages)))
        for row, length in enumerate(lengths):
            if stages:
                columns = step.kept[-1][row]
                columns = columns[columns >= width - length] - (width - length)
            else:
                columns = np.arange(length)
            self._kept[row] += (columns + self._cached).tolist()
        return step

    def _decode(self) -> Step:
        ids, positions, keep = self._single
        for index, row in enumerate(self.rows):
            ids[index, 0] = row.history[-1]
            positions[index, 0] = len(row.history) - 1
        return self._forward(ids, positions, keep)

    def _forward(self, ids: Any, positions: Any, keep: Any) -> Step:
        begin = time.perf_counter()
        step = self._engine.forward(ids, positions, keep, self.cache)
        self._clock.backend(time.perf_counter() - begin)
        self.cache = step.cache
        return step
