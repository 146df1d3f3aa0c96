"""A conversation that keeps its cache: each turn feeds only what is new. Knows no engine call and no sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from fstq_infer.errors import PromptError
from fstq_infer.runtime.chat import Message, check_messages
from fstq_infer.runtime.loop import Run
from fstq_infer.runtime.options import CURRENT
from fstq_infer.runtime.result import Clock, Result, Stream

if TYPE_CHECKING:
    from fstq_infer.adapters.store import Adapter
    from fstq_infer.runtime.generate import Generator


class Session:
    """Turns of one conversation, made by ``Generator.session``.

    With a chat template each turn renders the whole conversation and feeds what the cache does not hold yet; when the
    rendered ids do not begin with the cached ones (templates may rewrite earlier turns) it starts from an empty cache.
    Without a template the turns' texts simply follow one another. Pruning applies to each turn's new tokens.
    A turn that fails, is interrupted or whose stream is not read to the end leaves the session as it was.
    """

    __slots__ = (
        "_adapter",
        "_cache",
        "_generator",
        "_ids",
        "_kept",
        "_messages",
        "_open",
        "_plain",
        "_tools",
        "_variables",
    )

    def __init__(
        self,
        generator: Generator,
        messages: Sequence[Message] = (),
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises PromptError for malformed messages."""
        self._generator = generator
        self._messages = check_messages(messages) if messages else []
        self._tools = tools
        self._variables = variables
        self._ids: list[int] = []  # what the cache holds: the last sampled token has never been fed
        self._kept: list[int] = []  # of these, what the layers after the last stage hold
        self._cache: Any = None
        self._adapter: Adapter | None = None  # that the cache was filled with
        self._plain: list[int] | None = None  # without a template: the ids of the conversation so far
        self._open: Stream | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation so far."""
        return [dict(message) for message in self._messages]

    @property
    def cached_tokens(self) -> int:
        """Number of tokens that have been fed and are in the cache, pruned ones included."""
        return len(self._ids)

    @overload
    def send(self, text: str, *, stream: Literal[False] = False, **options: Any) -> Result: ...

    @overload
    def send(self, text: str, *, stream: Literal[True], **options: Any) -> Stream: ...

    def send(
        self, text: str, *, stream: bool = False, adapter: str | None = CURRENT, **options: Any
    ) -> Result | Stream:
        """Add the user's next text and generate the answer. Options and errors as in ``Generator.generate``.

        A stream of an earlier turn that is still open is given up. With another adapter than in the turn before, the
        whole conversation is read again.
        """
        clock = Clock()
        if not isinstance(text, str) or not text:
            raise PromptError(f"a turn needs a text that is not empty; found {text!r}")
        if self._open is not None:
            self._open.close()
        turn = {"role": "user", "content": text}
        adapters = self._generator._adapters(adapter, 1, False)
        checked = self._generator.options(options, adapters[0])
        ids = self._prompt(turn)
        state: dict[str, Any] = {}
        same = adapters[0] is self._adapter
        if same and self._ids and len(self._ids) < len(ids) and ids[: len(self._ids)] == self._ids:
            state = {"cache": self._cache, "kept": self._kept, "cached": len(self._ids)}
        run = self._generator.run([ids], checked, clock, adapters=adapters, **state)
        reply = self._generator.finish(run, clock, stream=stream, done=lambda run: self._commit(run, turn, adapters[0]))
        if isinstance(reply, Stream):
            self._open = reply
        return reply

    def _prompt(self, turn: dict[str, Any]) -> list[int]:
        """Ids of the whole conversation with the new turn."""
        tokenizer, template = self._generator.tokenizer, self._generator.template
        if template is not None:
            text = template.render([*self._messages, turn], tools=self._tools, variables=self._variables)
            return tokenizer.encode(text, special=False)
        if self._plain is None:
            return tokenizer.encode("".join(str(item["content"]) for item in [*self._messages, turn]))
        return self._plain + tokenizer.encode(turn["content"], special=False)

    def _commit(self, run: Run, turn: dict[str, Any], adapter: Adapter | None) -> None:
        """Take a finished turn over."""
        self._adapter = adapter
        result = run.result(0)
        history = run.rows[0].history
        self._cache = run.cache
        self._ids = history[:-1]
        self._kept = [*result.kept, *range(len(result.prompt_tokens), len(self._ids))]
        self._messages += [turn, {"role": "assistant", "content": result.text}]
        self._open = None
        if self._generator.template is not None:
            return
        answer = list(result.tokens if result.finish == "length" else result.tokens[:-1])
        tokenizer = self._generator.tokenizer
        if result.finish == "stop" and tokenizer.decode(answer) != result.text:
            # the tokens hold a part of the stop string, the conversation does not
            answer = tokenizer.encode(result.text, special=False)
        self._plain = [*result.prompt_tokens, *answer]
