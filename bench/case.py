"""One shape and prompt length of bench/inference.py: contenders in waves that memory holds, measured in turn.

Knows workers and artefacts by their names; neither what a runtime does nor where results go.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from artefacts import Maker, sizes
from lineup import CONTENDERS, Contender
from pool import Absent, Gone, Worker
from shapes import Shape

from fstq_infer.machine import available_memory, description

CHECKED = 24  # tokens after which logits are compared
SPARE = 1 << 30  # bytes of memory that stay free
PAUSE = 0.3  # seconds in which the last worker's threads fall asleep


@dataclass
class Loaded:
    """A contender whose worker waits. tried: seconds of each variant, or why it did not work."""

    contender: Contender
    worker: Worker
    artefact: str
    options: dict[str, Any]
    tried: list[dict[str, Any]]
    runs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One shape and prompt length."""

    maker: Maker
    shape: Shape
    prompt: int
    new: int
    threads: int
    rounds: int
    chosen: tuple[Contender, ...]
    versions: Mapping[str, Mapping[str, str]]
    numbers: int = 1 << 26  # in an array of the stream benchmark: 256 MiB

    def measure(self) -> dict[str, Any]:
        """Rows of all contenders, in waves of as many as memory holds; and the memory's speed."""
        began, rows, waves = time.time(), list[dict[str, Any]](), list[dict[str, Any]]()
        stream = Worker(sys.executable, "stream", "-", self.threads, {"numbers": self.numbers})
        waiting, anchor = list(self.chosen), self._load(self.chosen[0], rows)
        waiting.pop(0)
        speeds: dict[str, list[float]] = {}
        number = 0
        while number == 0 or waiting:
            wave = [anchor] if anchor else []
            while waiting and (not wave or self._fits(waiting[0], wave) or len(wave) == bool(anchor)):
                loaded = self._load(waiting.pop(0), rows)
                if loaded:
                    wave.append(loaded)
            wave = self._rounds(wave, stream, speeds, rows)
            waves.append({"contenders": [one.contender.name for one in wave]})
            if anchor not in wave:
                anchor = None
            if anchor:
                waves[-1]["anchor_s"] = statistics.median(run["total_s"] for run in anchor.runs[-self.rounds :])
            for one in wave:
                if one is not anchor:
                    rows.append(self._row(one, number))
                    one.worker.close()
            number += 1
        if anchor:
            anchor.runs = anchor.runs[: self.rounds]
            rows.append(self._row(anchor, 0))
            anchor.worker.close()
        stream.close()
        order = {contender.name: place for place, contender in enumerate(CONTENDERS)}
        rows.sort(key=lambda row: order[row["contender"]])
        _compare(rows)
        return {
            "shape": self.maker.name,
            "prompt": self.prompt,
            "new": self.new,
            "threads": self.threads,
            "rounds": self.rounds,
            "versions": self.versions,
            "stream": {name: statistics.median(found) for name, found in speeds.items()},
            "waves": waves,
            "rows": rows,
            "machine": description(),
            "seconds": time.time() - began,
        }

    def _rounds(
        self, wave: list[Loaded], stream: Worker, speeds: dict[str, list[float]], rows: list[dict[str, Any]]
    ) -> list[Loaded]:
        """Each contender once a round, every other round backwards; those that are left."""
        for number in range(self.rounds):
            for name, found in stream.ask({}).items():
                speeds.setdefault(name, []).append(found)
            for one in list(wave) if number % 2 == 0 else list(reversed(wave)):
                time.sleep(PAUSE)
                try:
                    one.runs.append(one.worker.ask(self._request("measure")))
                except Gone as gone:
                    rows.append({"contender": one.contender.name, "peer": one.contender.peer, "error": str(gone)})
                    wave = [other for other in wave if other is not one]
            print(f"{self.maker.name}, {self.prompt} tokens: round {number + 1} of {self.rounds}", flush=True)
        return wave

    def _request(self, what: str) -> dict[str, Any]:
        return {"do": what, "prompt": self.prompt, "new": self.new}

    def _fits(self, contender: Contender, wave: Sequence[Loaded]) -> bool:
        """Whether it finds room beside a wave, whose mapped weights the system calls available."""
        available = available_memory()
        if available is None:
            return True
        free = available - sum(one.worker.mapped() for one in wave)
        try:
            path = self.maker.path(contender.variants[0][0]) if contender.runtime == "fstq" else None
        except (Gone, RuntimeError):
            return True  # loading it tells why
        size = sizes(path)[0] if path else 4 * sum(rows * columns for rows, columns in self.shape.matrices().values())
        every = 8 * self.prompt * self.shape.vocab if contender.runtime == "onnxruntime" else 0  # all tokens' logits
        return free > size * 1.6 + every + SPARE

    def _load(self, contender: Contender, rows: list[dict[str, Any]]) -> Loaded | None:
        """The contender's fastest variant, warm; else a row that says why there is none. One is loaded at a time."""
        tried: list[dict[str, Any]] = []
        several, worker, best = len(contender.variants) > 1, None, None
        for artefact, options in contender.variants:
            seen: dict[str, Any] = {"artefact": artefact, "options": options}
            tried.append(seen)
            try:
                worker = self._warm(contender, artefact, options)
                seen["total_s"] = worker.ask(self._request("measure"))["total_s"] if several else 0.0
            except (Gone, RuntimeError) as error:
                seen["skipped" if isinstance(error, Absent) else "error"] = str(error)
                continue
            if best is None or seen["total_s"] < best["total_s"]:
                best = seen
            if several:
                worker.close()
        if best is None or worker is None:
            rows.append({"contender": contender.name, "peer": contender.peer, **tried[0], "tried": tried})
            print(f"{contender.name}: {tried[0].get('skipped') or tried[0].get('error')}", flush=True)
            return None
        if several:
            try:
                worker = self._warm(contender, best["artefact"], best["options"])
            except Gone as gone:
                rows.append({"contender": contender.name, "peer": contender.peer, "error": str(gone), "tried": tried})
                return None
        return Loaded(contender, worker, best["artefact"], best["options"], tried)

    def _warm(self, contender: Contender, artefact: str, options: dict[str, Any]) -> Worker:
        """A worker that has given one whole answer. Raises Gone, or RuntimeError where the artefact cannot be made."""
        path = self.maker.path(artefact)
        python = sys.executable if contender.runtime in ("fstq", "onnxruntime") else self.maker.peers
        worker = Worker(python, contender.runtime, str(path), self.threads, options)
        worker.ask(self._request("ready"))
        worker.ask(self._request("measure"))
        return worker

    def _row(self, one: Loaded, wave: int) -> dict[str, Any]:
        weights, read = sizes(self.maker.path(one.artefact))
        if one.contender.runtime == "transformers" and one.options["dtype"] == "float32":
            weights, read = 2 * weights, 2 * read  # the checkpoint is bfloat16
        middle = {key: statistics.median(run[key] for run in one.runs) for key in ("ttft_s", "decode_s", "total_s")}
        last = one.runs[-1]
        return {
            "contender": one.contender.name,
            "peer": one.contender.peer,
            "artefact": one.artefact,
            "options": one.options,
            **middle,
            "decode_ms": middle["decode_s"] / max(1, self.new - 1) * 1e3,
            "totals_s": [run["total_s"] for run in one.runs],
            "peak_rss": last["peak_rss"],
            "weights_bytes": weights,
            "read_bytes": read,
            "kv_bytes": last["kv_bytes"],
            "wave": wave,
            "tried": one.tried,
            "logits": self._logits(one),
        }

    def _logits(self, one: Loaded) -> list[float] | None:
        request = {"prompt": CHECKED, "new": 1}
        try:
            one.worker.ask({"do": "ready", **request})
            return list(one.worker.ask({"do": "logits", **request})["logits"])
        except Gone:
            return None  # what was measured stays


def _compare(rows: list[dict[str, Any]]) -> None:
    """``agreement``: correlation of each row's logits with the first float32 row's; 1 where weights are the same."""
    floats = [row for row in rows if row.get("logits") and "fp32" in row["contender"]]
    for row in rows:
        found = row.get("logits")
        if found and floats:
            row["agreement"] = statistics.correlation(found, floats[0]["logits"])
    for row in rows:
        row.pop("logits", None)
