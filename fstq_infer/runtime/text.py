"""Text to token ids and back, one token at a time, with stop strings. Knows tokenizer.json, no engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fstq_infer.errors import BundleError, PromptError

REPLACEMENT = "\ufffd"
PATIENCE = 8  # tokens; a character has at most 4 bytes, so more tokens than that cannot be one unfinished character


class Tokenizer:
    """A bundle's tokenizer.json. Truncation and padding set in the file are switched off: they would cut prompts."""

    __slots__ = ("_alone", "_core", "special_ids")

    def __init__(self, core: Any) -> None:
        """core: a ``tokenizers.Tokenizer``; it belongs to this object from here on."""
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._alone: dict[int, str] = {}  # texts of single tokens, no more of them than the vocabulary has
        added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer.json. Raises BundleError when it is absent or cannot be read."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"{path} cannot be read as a tokenizer.json: {error}. Export the bundle again, or install a newer "
                f"'tokenizers' (this is {tokenizers.__version__})"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the file's post-processor adds, such as a first BOS.

        Raises PromptError for text that is not Unicode (lone surrogates, as undecodable arguments have).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the text is not valid UTF-8 ({error.reason}); give it in UTF-8") from error
        ids: list[int] = self._core.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

    def decode_one(self, token_id: int) -> str:
        """Text of one id, remembered: generated text repeats its tokens, and looking one up is ten times faster."""
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self.decode([token_id])
        return text

    def token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary writes it, None for an unknown id."""
        token: str | None = self._core.id_to_token(token_id)
        return token

    def special_id(self, token: str) -> int | None:
        """Id of a special token, None when ``token`` is not one."""
        token_id: int | None = self._core.token_to_id(token)
        return token_id if token_id in self.special_ids else None


class TextStream:
    """Turns generated tokens into text that may be shown at once.

    Text is held back while it ends in the middle of a character or could be the beginning of a stop string. Pieces
    joined, then :meth:`flush`, equal ``tokenizer.decode`` of all tokens, cut before the stop string that ends first.
    One exception: byte-fallback decoders take valid bytes back when invalid ones follow; what was released stays.
    """

    __slots__ = ("_pieces", "_stops")

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._pieces = _Pieces(tokenizer)
        self._stops = _Stops(stop)

    @property
    def stopped(self) -> bool:
        """A stop string was met; no more text will come."""
        return self._stops.met

    def push(self, token: int) -> str:
        """The text that one more token releases, often empty."""
        return self._stops.push(self._pieces.push(token))

    def flush(self) -> str:
        """The text that was still held back, at the end; an unfinished character becomes U+FFFD here."""
        return self._stops.push(self._pieces.flush()) + self._stops.flush()


class _Pieces:
    """Incremental decoding over a short window of tokens.

    ``tokenizers.decoders.DecodeStream`` would do, but it cannot be flushed, raises when byte-fallback tokens change
    the text of those before them, and keeps every token of a run of bytes that are not UTF-8.
    """

    __slots__ = ("_before", "_context", "_pending", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens released last: decoders treat the first word differently
        self._before = ""  # their text
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        if token in self._tokenizer.special_ids:
            return ""
        self._pending.append(token)
        text = self._text(self._pending)
        if text and not text.endswith(REPLACEMENT):
            self._release(len(self._pending))
            return text
        return self._impatient(text) if len(self._pending) > PATIENCE else ""

    def flush(self) -> str:
        text = self._text(self._pending) if self._pending else ""
        self._release(len(self._pending))
        return text

    def _text(self, tokens: list[int]) -> str:
        """Text that ``tokens`` add to the context's."""
        text = self._tokenizer.decode(self._context + tokens)
        return text[len(self._before) :] if text.startswith(self._before) else self._tokenizer.decode(tokens)

    def _impatient(self, text: str) -> str:
        """Release the head of a long run that is no valid text, where cutting it does not change the text."""
        for cut in range(len(self._pending) - 4, len(self._pending) - PATIENCE, -1):
            head = self._text(self._pending[:cut])
            if head + self._tokenizer.decode(self._pending[cut:]) == text:
                self._release(cut)
                return head
        return ""

    def _release(self, count: int) -> None:
        self._context, self._pending = self._pending[:count], self._pending[count:]
        released, text = self._context, self._tokenizer
        self._before = text.decode_one(released[0]) if len(released) == 1 else text.decode(released)


class _Stops:
    """Holds back text that may become a stop string. How the text is split into pieces makes no difference."""

    __slots__ = ("_beginnings", "_held", "_stops", "met")

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        beginnings = {stop[:size] for stop in self._stops for size in range(1, len(stop))}
        self._beginnings = sorted(beginnings, key=len, reverse=True)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        if self.met or not text:
            return ""
        self._held += text
        # The stop string that ends first wins, as it would if the text came character by character.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        size = next((len(beginning) for beginning in self._beginnings if self._held.endswith(beginning)), 0)
        free = len(self._held) - size
        text, self._held = self._held[:free], self._held[free:]
        return text

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text
