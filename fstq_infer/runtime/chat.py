"""Chat messages to prompt text, by the model's own Jinja template. Knows messages and text, no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from fstq_infer.errors import OptionError, PromptError
from fstq_infer.runtime.sandbox import BUDGET, MAX_TEXT, Budget, TemplateSandbox

MAX_SOURCE = 256 << 10  # characters; docs/bundle-format.md

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat_template.jinja. May be rendered from several threads at once."""

    __slots__ = ("_template", "_tokens", "source")

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """tokens: texts that templates use by name, such as ``bos_token``. Raises OptionError for a bad template."""
        if len(source) > MAX_SOURCE:
            raise OptionError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are accepted")
        self.source = source
        self._tokens = dict(tokens or {})
        try:
            self._template = TemplateSandbox().template(source)
        except jinja2.TemplateSyntaxError as error:
            raise OptionError(
                f"the chat template is no valid Jinja: {error.message} (line {error.lineno}). Correct the model's "
                "chat_template and export again, or use generate() with plain text"
            ) from error
        except Exception as error:  # such as RecursionError from deep nesting
            raise OptionError(f"the chat template cannot be compiled: {_reason(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model was trained to read it.

        messages: ``{"role": ..., "content": ...}`` and what else the template knows. variables: extra names for the
        template, such as ``enable_thinking``. Raises PromptError when the messages are malformed or the template
        refuses them, fails, works too long or writes more than 4 Mi characters.
        """
        names = {
            **self._tokens,
            "documents": None,
            **plain(dict(variables or {})),
            "messages": check_messages(messages),
            "tools": plain(tools),
            "add_generation_prompt": add_generation_prompt,
            BUDGET: Budget(),
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(names):
                size += len(piece)
                if size > MAX_TEXT:
                    raise SecurityError(f"it writes more than {MAX_TEXT} characters")
                pieces.append(piece)
        except SecurityError as error:
            raise PromptError(f"the chat template was stopped: {error}. Do not trust this bundle") from error
        except jinja2.UndefinedError as error:
            raise PromptError(
                f"the chat template needs something that the messages lack: {error}. Expected messages with 'role' "
                "and 'content'; give further names in variables={...}"
            ) from error
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template can raise anything: TypeError, RecursionError, MemoryError ...
            raise PromptError(f"the chat template failed on these messages: {_reason(error)}") from error
        return "".join(pieces)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A plain copy of the messages. Raises PromptError unless each one is a mapping with a role."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages is a {type(messages).__name__}; expected a list such as [{{'role': 'user', 'content': 'Hello'}}]"
        )
    if not messages:
        raise PromptError("there are no messages; expected at least one, such as {'role': 'user', 'content': 'Hello'}")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(
                f"message {place} is {_short(message)}; expected a mapping with the text 'role' (user, assistant or "
                "system) and 'content'"
            )
    return [plain(message) for message in messages]


def plain(value: Any) -> Any:
    """A copy made of JSON's types only: an object's methods must not come within a template's reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise PromptError(f"messages may hold text, numbers, lists and mappings only; found a {type(value).__name__}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
