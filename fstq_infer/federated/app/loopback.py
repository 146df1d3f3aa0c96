"""A SuperLink and SuperNodes of Flower as processes on loopback, with TLS and node keys made on the spot."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fstq_infer.errors import StateError
from fstq_infer.federated.app.certificates import write_certificates, write_key
from fstq_infer.signals import undisturbed

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[3]
LINK, LOG_TAIL = "loopback", 3000


class Loopback:
    """Processes of one folder; leaving the context ends them all, and what they have started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        write_certificates(folder)
        (folder / "home").mkdir()
        (folder / "home/config.toml").write_text(
            f'[superlink]\ndefault = "{LINK}"\n[superlink.{LINK}]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder}/ca.crt"\n'
        )

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: Any) -> None:
        with undisturbed():
            self._end_gently("superlink")  # whose own processes have sessions of their own, and end with it
            for name in list(self.processes):
                self.kill(name)

    def superlink(self) -> None:
        """Start it, and wait until it listens."""
        self._start(
            "superlink", "flower-superlink", "--ssl-certfile", f"{self.folder}/server.pem", "--ssl-keyfile",
            f"{self.folder}/server.key", "--ssl-ca-certfile", f"{self.folder}/ca.crt", "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--port", str(self.port),
        )  # fmt: skip
        try:
            self.wait(self._listens, 300)
        except TimeoutError as error:
            raise StateError(f"the SuperLink does not listen after 300 s\n{error}") from error

    def supernode(self, name: str, settings: str, register: bool = True) -> None:
        """Start a node with a key of its own, which the SuperLink is told of first."""
        if register:
            write_key(self.folder / name)
            self.flwr("supernode", "register", f"{self.folder}/{name}.pub", LINK)
        self._start(
            name, "flower-supernode", "--root-certificates", f"{self.folder}/ca.crt", "--superlink",
            f"127.0.0.1:{self.port}", "--auth-supernode-private-key", f"{self.folder}/{name}", "--port",
            str(free_port()), "--node-config", settings,
        )  # fmt: skip

    def restarted(self, name: str, settings: str) -> None:
        """Start a node again if it has ended, as a service manager would: a SuperLink turns a node away for as long as
        it takes the killed one for alive."""
        if name not in self.processes or self.processes[name].poll() is not None:
            if name in self.processes:
                self.kill(name)
            self.supernode(name, settings, register=False)

    def flwr(self, *arguments: str) -> str:
        """What a command of the ``flwr`` tool prints. Raises StateError where it fails."""
        command = [str(BIN / "flwr"), *arguments]
        try:
            done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise StateError(f"'flwr {' '.join(arguments)}' did not end within 300 s") from error
        if done.returncode:
            raise StateError(f"'flwr {' '.join(arguments)}' failed: {done.stdout}{done.stderr}")
        return done.stdout

    def kill(self, name: str) -> None:
        """SIGKILL to a process and to those that it has started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"== {path.stem}\n{self.log(path.stem)[-LOG_TAIL:]}" for path in self.folder.glob("*.log"))

    def wait(self, until: Callable[[], bool], seconds: float, pause: float = 0.5) -> None:
        """Raises TimeoutError with the ends of all logs."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(self.logs())
            time.sleep(pause)

    def _end_gently(self, name: str) -> None:
        if name in self.processes:
            self.processes[name].terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(10)

    def _listens(self) -> bool:
        if (ended := self.processes["superlink"].poll()) is not None:
            raise StateError(f"the SuperLink has ended with {ended}\n{self.logs()}")
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def _start(self, name: str, command: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command), *arguments],
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        path = os.environ.get("PYTHONPATH")
        return {
            **os.environ,
            "FLWR_HOME": f"{self.folder}/home",
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
        }


def free_port() -> int:
    """A port of loopback that nothing uses now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
