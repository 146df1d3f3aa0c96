"""Worker processes of bench/worker.py, asked one at a time: requests and answers are lines of JSON over pipes."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().with_name("worker.py")
SECONDS = 1800.0  # for one answer


class Gone(Exception):
    """A worker ended, or answered with an error: the text says which."""


class Absent(Gone):
    """An interpreter lacks a runtime: the text has the command that installs it."""


class Worker:
    """One process; ``about``: what it said when loaded. Raises Gone where it cannot, Absent without a runtime."""

    def __init__(self, python: str, runtime: str, path: str, threads: int, options: dict[str, Any]) -> None:
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        if runtime == "stream":  # its own threads share the work
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        command = [python, str(WORKER), runtime, path, str(threads), json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        self.error = b""
        self.about = self._answer()
        if "missing" in self.about:
            self.close()
            raise Absent(f"{python} has no {self.about['missing']}: {self.about['install']}")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises Gone."""
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            pass  # the answer tells
        return self._answer()

    def mapped(self) -> int:
        """Bytes of files that the process holds in memory, its share of those that several do; 0 where not known."""
        try:
            lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_File:"))
        except OSError:
            return 0

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        out, err = self.process.stdout, self.process.stderr
        assert out is not None and err is not None
        line, open_pipes = b"", [out, err]
        while not line.endswith(b"\n"):
            ready, _, _ = select.select(open_pipes, [], [], SECONDS)
            if not ready:
                self.close()
                raise Gone(f"no answer within {SECONDS:.0f} s")
            for pipe in ready:
                data = os.read(pipe.fileno(), 1 << 16)
                if not data:
                    open_pipes.remove(pipe)
                if pipe is err:
                    self.error = (self.error + data)[-2000:]
                else:
                    line += data
            if out not in open_pipes:
                status = self.process.wait()
                raise Gone(f"ended with status {status}; it said: {self.error.decode(errors='replace')[-500:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise Gone(str(answer["error"]))
        return answer
