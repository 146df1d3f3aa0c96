"""The public Markdown pages of the repository: their code blocks, headings and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHELL = ("sh", "bash", "shell", "console")
_JOINERS = ("|", "||", "&&", ";", "&", "|&")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block; heading: the nearest one above it. line: of its first fence, from 1."""

    page: str
    line: int
    language: str
    text: str
    heading: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(page: str, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, heading = list[Block](), ""
    parsed = tokens((ROOT / page).read_text(encoding="utf-8") if text is None else text)
    for token, following in zip(parsed, [*parsed[1:], None], strict=True):
        if token.type == "heading_open" and following is not None:
            heading = following.content
        elif token.type == "fence" and token.map is not None:
            found.append(Block(page, token.map[0] + 1, token.info.strip().split(" ")[0], token.content, heading))
    return found


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    found = set[str]()
    parsed = tokens(text)
    for token, following in pairwise(parsed):
        if token.type == "heading_open":
            plain = "".join(c.content for c in following.children or [] if c.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
            same = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
            found.add(f"{slug}-{same}" if slug in found else slug)
    return found


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures, those in raw HTML included."""
    for token in tokens(text):
        for part in [token, *(token.children or [])]:
            for name in ("href", "src"):
                if (target := part.attrGet(name)) is not None:
                    yield str(target)
            if part.type in ("html_block", "html_inline"):
                yield from re.findall(r"(?:href|src)=\"([^\"]+)\"", part.content)


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell script as words, without comments, assignments and redirections."""
    script = re.sub(r"<\([^()]*\)|\$\([^()]*\)", "SUBSTITUTED", script.replace("\\\n", " "))
    script = re.sub(r"\d>&\d", "", script)
    found = list[list[str]]()
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command = list[str]()
        words = list(lexer)
        for i, word in enumerate(words):
            if word in _JOINERS:
                found.append(command)
                command = []
            elif not set(word) <= set("<>") and not (i and set(words[i - 1]) <= set("<>")):
                command.append(word)
        found.append(command)
    return [command for command in map(_bare, found) if command]


def _bare(command: list[str]) -> list[str]:
    """Without the variables that are set for it, and without sudo."""
    while command and (command[0] == "sudo" or re.fullmatch(r"\w+=.*", command[0])):
        command = command[1:]
    return command
