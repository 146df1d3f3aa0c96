"""Meters on real processes and threads: a tegrastats that prints recorded lines, sensors of a recorded device."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from fstq_infer.doctor.environment import Machine, Recording
from fstq_infer.errors import FstqError
from tests.jetson.scripts import JETSONS, LOGS, environment, script

meters = script("meters")

TEGRASTATS = """
import itertools, sys, time
assert sys.argv[2] == "--interval" and int(sys.argv[3]) == 100
for line in itertools.cycle(open(sys.argv[1])):
    print(line, end="", flush=True)
    time.sleep(0.01)
"""


def wait_until(done: object) -> None:
    until = time.monotonic() + 20
    while not done() and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.02)


def test_tegrastats(tmp_path: Path) -> None:
    program = tmp_path / "tegrastats.py"
    program.write_text(TEGRASTATS)
    meter = meters.Tegrastats((sys.executable, str(program), str(LOGS / "orin-nano.log")))
    for _ in range(2):  # a meter can be started again
        meter.start()
        wait_until(lambda: len(meter._samples) >= 3)
        samples = meter.stop()
        assert len(samples) >= 3 and samples[0].total > 4
        assert [one.time for one in samples] == sorted(one.time for one in samples)


def test_tegrastats_that_is_not_there() -> None:
    with pytest.raises(FstqError, match=r"no-such-program cannot be run.*another --power"):
        meters.Tegrastats(("no-such-program",)).start()


@pytest.mark.parametrize("name", JETSONS)
def test_sensors(name: str) -> None:
    meter = meters.choose(environment(name))
    assert meter.name == "ina"
    meter.start()
    wait_until(lambda: len(meter._samples) >= 2)
    samples = meter.stop()
    assert len(samples) >= 2 and samples[-1].total > 5


class Service(threading.Thread):
    """A jtop object: one thread, which starts once."""

    power: ClassVar[dict[str, object]] = {}
    temperature: ClassVar[dict[str, object]] = {}
    fails = False

    def __init__(self, interval: float) -> None:
        super().__init__()

    def attach(self, call: Callable[[object], None]) -> None:
        self.call = call

    def run(self) -> None:
        self.call(self)

    def start(self) -> None:
        if self.fails:
            raise Exception("The jtop.service is not active")
        super().start()

    def close(self) -> None:
        self.join()


def test_jtop_starts_again_and_its_errors_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", types.SimpleNamespace(jtop=Service))
    monkeypatch.setattr(meters, "from_jtop", lambda *found: found)
    meter = meters.Jtop(clock=lambda: 1.0)
    for _ in range(2):
        meter.start()
        assert len(meter.stop()) == 1
    monkeypatch.setattr(Service, "fails", True)
    with pytest.raises(FstqError, match=r"jtop failed: The jtop.service is not active.*--power"):
        meter.start()


def test_choosing() -> None:
    only = Recording({}, {"/usr/bin/tegrastats": ["/usr/bin/tegrastats"]}, {}, {})
    assert meters.choose(only).name == "tegrastats"
    assert meters.choose(environment("laptop")) is None
    assert meters.choose(environment("orin-nano"), "none") is None
    with pytest.raises(FstqError, match="'ina' here"):
        meters.choose(only, "ina")
    with pytest.raises(FstqError, match="'watts' here"):
        meters.choose(environment("orin-nano"), "watts")


def test_main_says_where_it_is_not_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    if meters.choose(Machine()) is not None:
        pytest.skip("this machine has sensors")
    with pytest.raises(SystemExit, match="no Jetson"):
        meters.main()
