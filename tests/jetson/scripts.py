"""The scripts of jetson/ as modules, and a device on which they run with a clock of its own."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fstq_infer import device
from fstq_infer.doctor.environment import Recording, replay
from fstq_infer.doctor.facts import gather
from fstq_infer.forecast import published_decoder
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.generate import Generator
from tests.runtime.mock import ToyEngine, small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LOGS = Path(__file__).parent / "tegrastats"
ENVIRONMENTS = ROOT / "tests" / "doctor" / "environments"
GOLDEN = ROOT / "tests" / "golden" / "jetson"
JETSONS = ("orin-nano", "orin-nx-16gb", "agx-orin-64gb", "thor")


def script(name: str) -> ModuleType:
    """jetson/NAME.py, as its neighbours import it."""
    folder = str(ROOT / "jetson")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def lines(name: str) -> list[str]:
    """Recorded tegrastats lines of a device."""
    return [line for line in (LOGS / f"{name}.log").read_text().splitlines() if line and not line.startswith("#")]


def environment(name: str) -> Recording:
    return replay(ENVIRONMENTS / f"{name}.json")


@dataclass
class Clock:
    """Seconds that pass only when something takes them."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class TimedEngine(ToyEngine):
    """The toy engine on a device: each call takes its share of the clock, by tokens fed and kept."""

    clock: Clock = field(default_factory=Clock)
    per_token: float = 1e-4
    per_call: float = 8e-3

    def forward(self, input_ids: Any, position_ids: Any, keep: Any, cache: Any) -> Any:
        step = super().forward(input_ids, position_ids, keep, cache)
        share = int(keep[0, -1]) if keep.size else input_ids.shape[1]
        self.clock.pass_by(self.per_call + self.per_token * (input_ids.shape[1] + 3 * share) / 4)
        return step


@dataclass
class ReplayedMeter:
    """Tegrastats that prints recorded lines, ten a second, over and over."""

    log: list[str]
    clock: Clock
    name: str = "tegrastats"
    began: float = 0.0

    def start(self) -> None:
        self.began = self.clock()

    def stop(self) -> list[Any]:
        parse = script("power").parse_line
        count = int((self.clock() - self.began) * 10) + 1
        return [parse(self.log[index % len(self.log)], self.began + index / 10) for index in range(count)]


def recorded_result(name: str, **changes: Any) -> dict[str, Any]:
    """A whole benchmark on a recorded device; ``changes`` override the plan."""
    benchmark = script("benchmark")
    env, clock = environment(name), Clock()
    facts = gather(env)
    engine = TimedEngine(stages=(Stage(2, 1, 4),), max_positions=600, clock=clock)
    decoder = published_decoder(device.published()["models"]["qwen3-0_6b"], "int4-128")
    meter = ReplayedMeter(lines(name), clock) if facts.jetson else None
    profile = benchmark.profile_for(facts, None)
    bench = benchmark.Bench(
        Generator(engine, small_tokenizer()), env, facts, profile, decoder, meter, clock, clock.pass_by
    )
    given = {"prompts": (128, 512, 4096), "keeps": (1.0, 0.25), "new_tokens": 16, "repeats": 2, "power_seconds": 1.0}
    plan = benchmark.Plan(**(given | changes))
    return benchmark.result(
        bench, plan, bench.run(plan), "toy.bundle", {"backend": "toy", "provider": "cpu", "peak_rss": 2**27}
    )
