"""A federation on this machine as across machines: Flower's processes, TLS and node keys, each client a node."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fstq_infer.errors import StateError
from fstq_infer.federated.app.config import Config
from fstq_infer.federated.app.loopback import LINK, Loopback
from fstq_infer.federated.app.project import write_app
from fstq_infer.federated.app.server import Progress
from fstq_infer.federated.app.sinks import read_lines
from fstq_infer.signals import interrupted_by_sigterm

PAUSE, ASK_EVERY = 2.0, 10  # seconds between two looks at the rounds; looks between two questions about the run


def run_on_supernodes(config: Config, resume: bool = False, progress: Progress | None = None) -> None:
    """Run the configured rounds on a SuperLink and [simulation] clients SuperNodes; nothing of them stays behind.

    Raises StateError, with the ends of their logs, where a process ends early or a round takes far too long.
    """
    config = absolute(config, resume)
    rounds, count = Path(config.output.folder) / "rounds.jsonl", config.simulation.clients
    before = len(read_lines(rounds)) if config.server.resume else 0
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="fstq-supernodes-") as scratch:
        write_app(Path(scratch) / "app", "loopback", config.flat())
        with Loopback(Path(scratch)) as link:
            link.superlink()
            for node in range(count):
                link.supernode(f"node{node}", f"partition-id={node} num-partitions={count}")
            link.flwr("run", f"{scratch}/app", LINK)
            _follow(link, config, rounds, before, progress)


def absolute(config: Config, resume: bool) -> Config:
    """The configuration for processes whose working directory is another; all nodes take part unless it says how many.

    The first round waits until all of them are there.
    """
    from fstq_infer.federated.app.inner import accepted

    count = config.simulation.clients
    waiting = {"min_train_nodes": count, "min_available_nodes": count}
    wanted = {key: value for key, value in waiting.items() if accepted(config.server.strategy, key)}
    paths: dict[str, Any] = {
        "model": replace(config.model, path=str(Path(config.model.path).absolute())),
        "output": replace(config.output, folder=str(Path(config.output.folder).absolute())),
        "client": replace(config.client, memory=str(Path(config.client.memory).absolute())),
    }
    if config.data.kind != "hub":
        paths["data"] = replace(config.data, path=str(Path(config.data.path).absolute()))
    server = replace(config.server, resume=resume or config.server.resume)
    return replace(config, **paths, server=server, strategy={**wanted, **config.strategy})


def _follow(link: Loopback, config: Config, rounds: Path, before: int, progress: Progress | None) -> None:
    seen, looks, adapter = before, 0, Path(config.output.folder) / "adapter"
    old, rounds_old = modified(adapter), modified(rounds)

    def over() -> bool:
        nonlocal seen, looks
        lines, looks = read_lines(rounds) if before or modified(rounds) != rounds_old else [], looks + 1
        for line in lines[seen:]:
            if progress is not None:
                progress(line["round"], line)
        seen = max(seen, len(lines))
        for name, process in link.processes.items():
            if process.poll() is not None:
                raise StateError(f"{name} has ended with {process.returncode}\n{link.logs()}")
        new = modified(adapter) not in (None, old)
        if not new and looks % ASK_EVERY == 0 and _failed(_listed(link)):
            raise StateError(f"the run has failed after {seen} rounds\n{link.logs()}")
        return new

    try:
        link.wait(over, (config.server.rounds - before + 1) * config.server.timeout, PAUSE)
    except TimeoutError as error:
        raise StateError(f"after {seen} rounds nothing more came\n{error}") from error


def modified(path: Path) -> int | None:
    """When, in nanoseconds; None for what is not there."""
    return path.stat().st_mtime_ns if path.exists() else None


def _listed(link: Loopback) -> str:
    """The runs in JSON; none where the SuperLink does not answer now, which is asked again later."""
    try:
        return link.flwr("list", LINK, "--format", "json")
    except StateError:
        return '{"runs": []}'


def _failed(listed: str) -> bool:
    """Whether a run in the list that ``flwr list`` prints has ended, and not well."""
    return any(run["status"] in ("finished:failed", "finished:stopped") for run in json.loads(listed)["runs"])
