"""A finding: what was found, how bad it is, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fstq_infer.doctor.facts import Facts

Severity = Literal["ok", "info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info", "ok")


@dataclass(frozen=True, slots=True)
class Finding:
    """check: a name that stays the same. todo: commands or steps, empty where nothing is to be done."""

    check: str
    severity: Severity
    found: str
    todo: str = ""


Check = Callable[[Facts], list[Finding]]
