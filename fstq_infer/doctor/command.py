"""``fstq doctor``: runs the checks and prints findings, for people or programs.

Exit code 1 where a finding is an error, else 0: warnings cost speed or memory, errors keep something from working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fstq_infer.atomic import replace_file
from fstq_infer.doctor import hardware, software
from fstq_infer.doctor.environment import Environment, Machine, Recorder
from fstq_infer.doctor.environment import replay as read_recording
from fstq_infer.doctor.facts import Facts, gather, jetpack_of
from fstq_infer.doctor.findings import SEVERITIES, Check, Finding
from fstq_infer.errors import OptionError
from fstq_infer.terminal import notes, out

CHECKS: tuple[Check, ...] = (
    software.versions,
    software.device,
    software.jetpack,
    software.cuda,
    software.tensorrt,
    software.onnxruntime,
    software.wheels,
    hardware.memory,
    hardware.fragments,
    hardware.swap,
    hardware.power,
    hardware.clocks,
    hardware.heat,
    hardware.access,
    hardware.measuring,
)
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan", "ok": "green"}


def doctor(*, json: bool, record: Path | None, replay: Path | None) -> int:
    """The command; returns its exit code. Raises OptionError for a file that cannot be read or written."""
    machine: Environment = Machine() if replay is None else read_recording(replay)
    recorder = Recorder(machine)
    with notes.status("asking the machine"):
        facts = gather(recorder)
    found = examine(facts)
    if record is not None:
        try:
            replace_file(record, recorder.to_json().encode())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise OptionError(
                f"--record {record} cannot be written: {error}; name a file in an existing folder"
            ) from error
    if json:
        out.data(as_json(facts, found))
    else:
        for finding in found:
            out.print(f"{finding.severity:<7}", style=STYLES[finding.severity], end=" ")
            out.print(f"{finding.check}: {finding.found}")
            if finding.todo:
                out.print(f"        -> {finding.todo}", style="bold")
        out.print(summary(found))
    return int(any(finding.severity == "error" for finding in found))


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order of the checks."""
    return [finding for check in CHECKS for finding in check(facts)]


def summary(found: Sequence[Finding]) -> str:
    """Counts by severity."""
    counts = {severity: sum(finding.severity == severity for finding in found) for severity in SEVERITIES}
    plural = {"error": "errors", "warning": "warnings"}
    named = ((count, plural.get(severity, severity) if count > 1 else severity) for severity, count in counts.items())
    return ", ".join(f"{count} {name}" for count, name in named if count)


def as_json(facts: Facts, found: Sequence[Finding]) -> dict[str, object]:
    """For programs."""
    return {
        "system": facts.system,
        "python": facts.python,
        "versions": software.versions_of(facts),
        "jetson": facts.jetson,
        "profile": facts.profile.name if facts.profile else None,
        "l4t": f"{facts.l4t[0]}.{facts.l4t[1]}" if facts.l4t else None,
        "jetpack": facts.debian.get("nvidia-jetpack") or (jetpack_of(facts.l4t) if facts.l4t else None),
        "cuda": facts.cuda,
        "tensorrt": facts.tensorrt,
        "power_mode": facts.power.mode if facts.power else None,
        "findings": [asdict(finding) for finding in found],
        "errors": sum(finding.severity == "error" for finding in found),
        "warnings": sum(finding.severity == "warning" for finding in found),
    }
