"""Rows of text to examples of tokens, with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fstq_infer.errors import OptionError
from fstq_infer.federated.train import IGNORED, Example
from fstq_infer.lazy import load


@dataclass(frozen=True, slots=True)
class Texts:
    """Turns (prompt, answer, group) into tokens: the prompt, a space and the answer, the end.

    learn_all: the prompt's tokens have labels too.
    An example longer than ``max_tokens`` loses the end of its answer beyond half of them, then the start of its prompt.
    """

    tokenizer: Any
    max_tokens: int
    learn_all: bool = False

    @classmethod
    def of(cls, path: str, max_tokens: int, learn_all: bool = False) -> Texts:
        """With the tokenizer of a model's folder. Raises OptionError where there is none."""
        auto = load("transformers:AutoTokenizer", "training an adapter", "federated")
        try:
            return cls(auto.from_pretrained(path, local_files_only=True), max_tokens, learn_all)
        except (OSError, ValueError) as error:
            raise OptionError(f"[model] path {path} has no tokenizer that can be loaded: {error}") from error

    def examples(self, rows: Iterable[tuple[str, str, str]]) -> list[Example]:
        """One example for each row that has at least two tokens and something to learn."""
        found = list[Example]()
        for prompt, answer, _ in rows:
            before, after = self._encode(prompt, answer)
            if self.tokenizer.eos_token_id is not None:
                after = [*after, self.tokenizer.eos_token_id]
            after = after[: max(self.max_tokens // 2, self.max_tokens - len(before))]
            before = before[max(len(before) - (self.max_tokens - len(after)), 0) :]
            tokens = tuple(before + after)
            labels = tokens if self.learn_all else (*[IGNORED] * len(before), *after)
            if len(tokens) >= 2 and any(label != IGNORED for label in labels[1:]):
                found.append(Example(tokens, tuple(labels)))
        return found

    def _encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the answer as it follows after a space: where pieces hold the space before
        them, an answer by itself is cut into others than those that the model will be asked for."""
        if not prompt:
            return [], self.tokenizer.encode(answer)
        before, whole = self.tokenizer.encode(prompt), self.tokenizer.encode(f"{prompt} {answer}")
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.tokenizer.encode(f" {answer}", add_special_tokens=False)
