"""Meters: sources of power samples that run beside a measurement. Run it to see ten seconds of samples."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from power import LineError, Sample, from_jtop, parse_line, read_sensors

from fstq_infer.doctor.environment import Environment, Machine
from fstq_infer.errors import FstqError

INTERVAL = 0.1  # seconds between samples


class Meter(Protocol):
    """A source of samples while something runs."""

    name: str

    def start(self) -> None:
        """Begin to collect."""

    def stop(self) -> list[Sample]:
        """All samples since the start, in order of time."""


class Sensors:
    """Reads INA sensors in a thread; each reading takes milliseconds on the bus."""

    name = "ina"

    def __init__(self, env: Environment, clock: Callable[[], float] = time.perf_counter) -> None:
        self._env, self._clock = env, clock
        self._samples: list[Sample] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """See Meter."""
        self._samples, self._ended = [], threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        while not self._ended.is_set():
            self._samples.append(read_sensors(self._env, self._clock()))
            self._ended.wait(INTERVAL)

    def stop(self) -> list[Sample]:
        """See Meter."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        return self._samples


class Tegrastats:
    """Runs tegrastats beside the measurement."""

    name = "tegrastats"

    def __init__(
        self, command: Sequence[str] = ("tegrastats",), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._command, self._clock = [*command, "--interval", str(round(INTERVAL * 1000))], clock
        self._samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """See Meter. Raises FstqError where tegrastats cannot be run."""
        self._samples = []
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise FstqError(f"{self._command[0]} cannot be run: {error}; choose another --power source") from error
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        for line in (self._process.stdout or ()) if self._process else ():
            try:
                self._samples.append(parse_line(line, self._clock()))
            except LineError:
                continue

    def stop(self) -> list[Sample]:
        """See Meter."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._thread is not None:
            self._thread.join()
        return self._samples


class Jtop:
    """Asks jetson-stats' service, which samples on its own."""

    name = "jtop"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        from jtop import jtop  # type: ignore[import-not-found]

        self._make, self._clock = jtop, clock
        self._samples: list[Sample] = []
        self._jtop: Any = None

    def start(self) -> None:
        """See Meter. Raises FstqError where the service does not answer."""
        self._samples = samples = list[Sample]()
        with _jtop_errors():
            self._jtop = self._make(interval=INTERVAL * 5)  # a thread, which starts only once
            self._jtop.attach(lambda j: samples.append(from_jtop(j.power, j.temperature, self._clock())))
            self._jtop.start()

    def stop(self) -> list[Sample]:
        """See Meter. Raises FstqError where the service has failed."""
        ended, self._jtop = self._jtop, None
        if ended is not None:
            with _jtop_errors():
                ended.close()
        return self._samples


@contextlib.contextmanager
def _jtop_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # JtopException, and what sockets raise
        raise FstqError(f"jtop failed: {error}; restart its service, or choose another --power source") from error


def choose(env: Environment, wanted: str = "auto") -> Meter | None:
    """The meter of that name, or the best there is, None for none. Raises FstqError for one that is absent."""
    if wanted in ("auto", "ina") and read_sensors(env).rails:
        return Sensors(env)
    if wanted in ("auto", "tegrastats") and env.glob("/usr/bin/tegrastats"):
        return Tegrastats()
    if wanted in ("auto", "jtop") and env.glob("/run/jtop.sock"):
        try:
            return Jtop()
        except ModuleNotFoundError:
            pass
    if wanted not in ("auto", "none"):
        raise FstqError(
            f"power cannot be read from {wanted!a} here; expected auto, none, or one of ina, tegrastats, jtop"
        )
    return None


def main() -> None:
    """Print ten seconds of samples."""
    meter = choose(Machine())
    if meter is None:
        sys.exit("no INA sensor, tegrastats or jtop here: this is no Jetson, or a container that does not show them")
    meter.start()
    time.sleep(10)
    for sample in meter.stop():
        total = "" if sample.total is None else f"  module {sample.total:.2f} W"
        print(
            f"{sample.time:.2f} s{total}  " + "  ".join(f"{name} {watts:.2f} W" for name, watts in sample.rails.items())
        )


if __name__ == "__main__":
    main()
