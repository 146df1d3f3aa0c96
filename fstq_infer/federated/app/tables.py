"""Reading TOML, and names with dots, into tables of tables. Knows no key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fstq_infer.errors import ConfigError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

MOST_BYTES = 1 << 20  # of a configuration file


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file. Raises ConfigError for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}. Name a TOML file.") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path} has more than {MOST_BYTES} bytes, expected a configuration.")
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def nested(settings: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Tables of ``section.key`` names. Raises ConfigError for a name without a section."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if not dot:
            raise ConfigError(f"{where} has {name!a}, expected SECTION.KEY, such as server.rounds")
        tables.setdefault(section, {})[key] = value
    return tables


def parse_change(text: str) -> tuple[str, Any]:
    """(``section.key``, value) of ``section.key=value``; the value is TOML, or else text."""
    name, sign, value = text.partition("=")
    if not sign or "." not in name:
        raise ConfigError(f"--set {text!a}, expected SECTION.KEY=VALUE, such as server.rounds=20")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
