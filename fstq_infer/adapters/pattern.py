"""Names of modules against PEFT's patterns, which are regular expressions in a file that nobody vouches for.

A safe part of the language is accepted: what it matches takes time quadratic in a name's length at worst.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from fstq_infer.errors import AdapterKindError

LONGEST, MOST, QUANTIFIERS = 256, 4096, 2
LONGEST_NAME = 512  # of a module
_SAFE = re.compile(
    r"(?:\^(?!.*\|))?(?:[\w\-.|]|\\[.dw]|\((?:\?:)?(?=[^()]*\)(?![*+?{]))|\)|\[[\w\-.]+\]|(?<=[\w.\]])[*+?])*\$?"
)
Value = TypeVar("Value")


def check(patterns: Iterable[str], what: str) -> None:
    """Raise AdapterKindError for a pattern that is not safe to try."""
    listed = list(patterns)
    if len(listed) > MOST:
        raise AdapterKindError(f"{what} has {len(listed)} patterns, expected at most {MOST}. Write fewer.")
    for pattern in listed:
        quantified = sum(pattern.count(sign) for sign in "*+?{") - pattern.count("(?:")
        if len(pattern) > LONGEST or quantified > QUANTIFIERS or not _SAFE.fullmatch(pattern):
            raise AdapterKindError(
                f"{what} has the pattern {pattern[:80]!a}, which this reader does not try, since bad patterns take "
                "for ever. Write modules' names in its place, such as 'layers.0.self_attn.q_proj'."
            )
        try:
            _compiled(pattern)
        except re.error as error:
            raise AdapterKindError(f"{what} has the pattern {pattern[:80]!a}, which is none: {error}.") from error


def matches(pattern: str, module: str) -> bool:
    """PEFT's rule: the pattern equals the module's name, or its end from a dot on. ``pattern`` has been checked."""
    if pattern == module or module.endswith(f".{pattern}"):
        return True
    ends = (module,) if pattern.startswith("^") else _ends(module)
    return any(map(_compiled(pattern).fullmatch, ends))


_compiled = functools.lru_cache(maxsize=MOST)(re.compile)


def _ends(module: str) -> Iterator[str]:
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def find(patterns: Mapping[str, Value], module: str, otherwise: Value) -> Value:
    """Value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if matches(pattern, module)), otherwise)
