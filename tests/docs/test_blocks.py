"""Code blocks of README and docs: commands, options, extras, targets, modules, names and files that they use exist."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fstq_infer.cli import app
from fstq_infer.runtime.generate import Generator
from fstq_infer.runtime.session import Session
from tests.docs.pages import NAMES, ROOT, SHELL, Block, blocks, commands

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SCRIPTS = ("bench/", "jetson/", "docs/")
KNOWN = {"generator": Generator, "Generator": Generator, "session": Session}
ALL = [block for name in NAMES for block in blocks(name)]


def of(*languages: str) -> Any:
    found = [block for block in ALL if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=[block.place for block in found])


def wrong_with(command: list[str]) -> str | None:
    """What a command of ours, pip or make names that does not exist."""
    program, *words = command
    if program == "fstq":
        return wrong_words(words)
    if program == "pip" and "install" in words:
        named = [extra for word in words for extra in re.findall(r"^fstq-infer\[(.+)\]$", word)]
        return next((f"extra {e}" for extras in named for e in extras.split(",") if e not in EXTRAS), None)
    if program == "make":
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        return next((f"target {target}" for target in targets if target not in TARGETS), None)
    script = words[0] if program.startswith("python") and words else program
    if script.startswith(SCRIPTS) and not (ROOT / script).is_file():
        return f"script {script}"
    return wrong_flags(ROOT / script, words[1:]) if script.startswith(SCRIPTS) and script.endswith(".py") else None


def wrong_words(words: list[str]) -> str | None:
    """What the command line does not know: a command, an option, or one word too many."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {name: parameter for parameter in command.params for name in parameter.opts}
    arguments = sum(parameter.param_type_name == "argument" for parameter in command.params)
    given, value = 0, False
    for word in words:
        if value:
            value = False
        elif word.startswith("-") and word != "-":
            name, _, own = word.partition("=")
            if name not in options and name != "--help":
                return f"option {name}"
            value = not own and name != "--help" and not options[name].is_flag
        else:
            given += 1
    return f"{given} arguments" if given > arguments else "option without a value" if value else None


def wrong_flags(script: Path, words: list[str]) -> str | None:
    """An option that a script's source does not hold."""
    source = script.read_text(encoding="utf-8")
    return next((f"option {w}" for w in words if w.startswith("--") and f'"{w.partition("=")[0]}"' not in source), None)


def names_of(module: str) -> set[str] | None:
    """Names at the top level of a module of ours, by its source, and of its submodules; None where there is none."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    found = set[str]()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found | {path.stem for path in Path(spec.origin).parent.glob("*.py") if spec.submodule_search_locations}


def wrong_in(source: str) -> str | None:
    """A module, name or argument of ours that a Python block uses and that does not exist. Raises SyntaxError."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fstq_"):
            names = names_of(str(node.module))
            for alias in node.names:
                if names is None or alias.name not in names:
                    return f"{node.module}.{alias.name}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            owner = KNOWN.get(node.func.value.id)
            if owner is not None and (wrong := wrong_call(owner, node.func.attr, node)):
                return wrong
    return None


def wrong_call(owner: type, method: str, call: ast.Call) -> str | None:
    """An argument that a method does not name; ``**options`` are those of ``Generator.generate``."""
    if not hasattr(owner, method):
        return f"{owner.__name__}.{method}"
    known = set(inspect.signature(getattr(owner, method)).parameters)
    if "options" in known:
        known |= set(inspect.signature(Generator.generate).parameters)
    named = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    return next((f"{owner.__name__}.{method}({name}=)" for name in named if name not in known), None)


def test_every_kind_of_block_is_there() -> None:
    assert {"sh", "python", "toml", "json"} <= {block.language for block in ALL}


@of(*SHELL)
def test_shell(block: Block) -> None:
    found = commands(block.text)
    assert found
    assert [wrong for command in found if (wrong := wrong_with(command))] == []


@of("python")
def test_python(block: Block) -> None:
    assert wrong_in(block.text) is None


@of("toml")
def test_toml(block: Block) -> None:
    assert tomllib.loads(block.text)


@of("json")
def test_json_lines(block: Block) -> None:
    assert all(json.loads(line) for line in block.text.splitlines())


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("fstq exprt model --out b", "command exprt"),
        ("fstq adapter ad b f", "command ad"),
        ("fstq build b --fast", "option --fast"),
        ("fstq build b c", "2 arguments"),
        ("fstq run b 'a prompt' --keep", "option without a value"),
        ("cat x | fstq run b - --kept", "option --kept"),
        ("A=1 pip install 'fstq-infer[exprot]'", "extra exprot"),
        ("make dmeo", "target dmeo"),
        ("python bench/absent.py", "script bench/absent.py"),
        ("python docs/tutorial/rag.py ask b q --absent", "option --absent"),
    ],
)
def test_wrong_commands_are_found(line: str, wrong: str) -> None:
    assert [w for command in commands(line) if (w := wrong_with(command))] == [wrong]


@pytest.mark.parametrize(
    "line",
    [
        'fstq run b "$(cat x)" --keep 0.5 --show-kept  # or --keep auto',
        "fstq export m \\\n  --out b --adapter a=b --adapter c > log 2>&1 && fstq --version",
        "sudo make demo MODEL=x",
        "pip install 'fstq-infer[ort]' other[absent]",
    ],
)
def test_right_commands_pass(line: str) -> None:
    assert [w for command in commands(line) if (w := wrong_with(command))] == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from fstq_infer import Generater", "fstq_infer.Generater"),
        ("from fstq_infer.absent import x", "fstq_infer.absent.x"),
        ("Generator.load('b', backen='ort')", "Generator.load(backen=)"),
        ("session.send('x', max_token=3)", "Session.send(max_token=)"),
        ("generator.generat('x')", "Generator.generat"),
    ],
)
def test_wrong_python_is_found(source: str, wrong: str) -> None:
    assert wrong_in(source) == wrong


def test_python_that_is_none() -> None:
    with pytest.raises(SyntaxError):
        wrong_in("from fstq_infer import")


def test_figures_of_the_readme_are_those_measured() -> None:
    measured = [
        row for row in json.loads((ROOT / "bench/results/pruning.json").read_text())["rows"] if "kv_bytes" in row
    ]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, key, unit in (
        ("prefill, seconds (probe included)", "prefill_s", 1),
        ("prompt + 64 new tokens, seconds", "total_s", 1),
        ("key-value cache, MiB", "kv_bytes", 2**20),
    ):
        (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
        shown = [float(cell) for cell in line.split("|")]
        assert shown == pytest.approx([row[key] / unit for row in measured], abs=0.051)
