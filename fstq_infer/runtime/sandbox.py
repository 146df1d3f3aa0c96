"""The Jinja environment that chat templates run in: Hugging Face's helpers, and limits on work and memory.

A template comes with a model that somebody else made. Jinja's sandbox keeps it from Python's internals; what is added
here keeps a small template from building a huge text or running for hours.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 4 << 20  # characters
MAX_GROWTH = 64 << 20  # characters one operation may be feared to produce
MAX_STEPS = 500_000  # loop rounds and calls
MAX_BITS = 4096  # of an integer
BUDGET = "\0budget"  # a name that no template can write

# Results can be as long as the product of the sizes of what goes in.
GROWING_METHODS = frozenset({"replace", "join", "expandtabs", "center", "ljust", "rjust", "zfill", "translate"})
GROWING_FILTERS = ("replace", "join", "indent", "center", "wordwrap", "batch", "slice", "urlize")
WIDE_FORMAT = re.compile(r"\d{5,}|%[^a-zA-Z]*\*|\{[^{}]*\{")


def _limit(size: int, most: int) -> None:
    if size > most:
        raise SecurityError(f"it builds a text or list of more than {MAX_TEXT} characters or items")


def _join(parts: Iterable[str]) -> str:
    """``"".join`` that gives up before the text is too long."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        _limit(size, MAX_TEXT)
        kept.append(part)
    return "".join(kept)


class Budget:
    """Work left to one rendering."""

    __slots__ = ("left",)

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} loop rounds and calls")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Compile templates with :meth:`template`; rendering needs a :class:`Budget` under the name ``BUDGET``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join)  # joins what blocks and macros write

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_printable)
        del self.globals["lipsum"], self.filters["pprint"]
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_TemplateNamespace
        )
        for name in GROWING_FILTERS:
            self.filters[name] = _guarded(self.filters[name])
        self.filters.update(tojson=_to_json, format=_format, string=_string, _rounds=_rounds, _concat=_concat)

    def template(self, source: str) -> jinja2.Template:
        """Compile. Raises jinja2.TemplateError."""
        tree = _Instrument().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS} bits")
        elif operator == "+":
            _limit(_size(left) + _size(right), MAX_TEXT)
        elif operator == "*" and not (isinstance(left, float) or isinstance(right, float)):
            _limit(_size(left) * _size(right), MAX_TEXT)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __context.parent[BUDGET].spend()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if method.__name__ in GROWING_METHODS:
                args = _listed(args)
                _guard(owner, *args, *kwargs.values())
            elif method.__name__ in ("format", "format_map"):
                _check_format(owner)
        return super().call(__context, __obj, *args, **kwargs)


class _Instrument(NodeTransformer):
    """Count the rounds of loops, and join ``a ~ b`` through a filter that looks at the length."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_rounds", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_concat", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(Namespace):
    """``namespace()`` without underscore names, as Hugging Face has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace; names may not begin with an underscore")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """``tojson`` as chat templates expect it: unlike Jinja's own, without HTML escapes."""
    if isinstance(indent, int) and indent > 16:
        raise SecurityError("it indents JSON by more than 16 characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _join(encoder.iterencode(value))


def _format(pattern: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's ``format`` filter and the ``%`` operator on text."""
    _check_format(str(pattern))
    return str(pattern) % (kwargs or args)


def _check_format(pattern: str) -> None:
    if WIDE_FORMAT.search(pattern):
        raise SecurityError("it formats with a width that is too large or computed")


def _concat(parts: list[Any]) -> str:
    return _join(map(_string, parts))


def _string(value: Any) -> str:
    return str(_printable(value))


def _printable(value: Any) -> Any:
    """The value itself, unless it is a list of lists of ... whose text would be far longer than what holds it."""
    if isinstance(value, (list, tuple, Mapping)):
        _limit(_weigh(value, MAX_TEXT), MAX_TEXT)
    return value


def _weigh(value: Any, most: int) -> int:
    """About as many characters as the value prints; counts little further than ``most``."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, Mapping)):
        return 1
    size = 2
    for item in value.items() if isinstance(value, Mapping) else value:
        size += 1 + _weigh(item, most - size)
        if size > most:
            break
    return size


@jinja2.pass_context
def _rounds(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context.parent[BUDGET]
    for item in items:
        budget.spend()
        yield item


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at the size of its arguments first. Keeps Jinja's marks on the function."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        args = _listed(args)
        _guard(*args, *kwargs.values())
        return function(*args, **kwargs)

    return guarded


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with iterators read out, so that they have a size."""
    return tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)


def _guard(*args: Any) -> None:
    sizes = sorted(map(_size, args))
    _limit(sizes[-1] * max(sizes[-2] if len(sizes) > 1 else 1, 1), MAX_GROWTH)


def _size(value: Any) -> int:
    """Characters or items of a value, the absolute value of a number (it may be a width or a count)."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, (str, bytes, Mapping)):
        return len(value)
    if isinstance(value, (list, tuple)):
        return len(value) + sum(len(item) for item in value if isinstance(item, str))
    return 0
