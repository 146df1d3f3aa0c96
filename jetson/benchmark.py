"""Benchmark of a bundle on a Jetson: dense beside pruned over prompt lengths, with power, heat and a roofline.

    python jetson/benchmark.py my.bundle --out results          # on the device; writes JSON, Markdown and plots
    python jetson/benchmark.py my.bundle --prompts 128,512 --keep 1.0,0.5 --repeats 5

Off a Jetson it runs on the CPU, says so and leaves power out. Runs are interleaved after a warm-up; medians. Power
comes from passes of their own that last long enough for the sensors: prefill after prefill, then decode after decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from meters import Meter, choose
from power import Sample, energy
from report import markdown, plot

from fstq_infer import __version__, device
from fstq_infer.atomic import replace_file
from fstq_infer.bundle import Bundle
from fstq_infer.doctor.command import as_json, examine
from fstq_infer.doctor.environment import Environment, Machine
from fstq_infer.doctor.facts import Facts, gather
from fstq_infer.errors import FstqError, OptionError
from fstq_infer.machine import description, peak_rss
from fstq_infer.roofline import Decoder, predict
from fstq_infer.runtime.bench import Run, once, summary
from fstq_infer.runtime.generate import Generator
from fstq_infer.runtime.options import keep_counts, keep_ratios
from fstq_infer.shape import decoder_of

PROMPTS = (128, 256, 512, 1024, 2048, 4096)
LEAST_SAMPLES = 5  # of power in one phase; with fewer nothing is claimed
LONGEST_COOLING = 120.0  # seconds

Clock = Callable[[], float]
Sleep = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. cool: degrees Celsius to wait for before each prompt length. power_seconds: of a power pass."""

    prompts: Sequence[int]
    keeps: Sequence[float]
    new_tokens: int = 64
    repeats: int = 5
    power_seconds: float = 4.0
    cool: float = 60.0
    seed: int = 0


@dataclass
class Bench:
    """A generator on a machine. profile: None where none is known. meter: None where power cannot be read."""

    generator: Generator
    env: Environment
    facts: Facts
    profile: device.Profile | None
    decoder: Decoder
    meter: Meter | None
    clock: Clock = time.perf_counter
    sleep: Sleep = time.sleep
    notes: list[str] = field(default_factory=list)

    def run(self, plan: Plan) -> list[dict[str, Any]]:
        """A row for each prompt length and keep ratio. Raises OptionError for what does not fit the engine."""
        engine = self.generator.engine
        prompts = [prompt for prompt in plan.prompts if prompt + plan.new_tokens <= engine.max_positions]
        if len(prompts) < len(plan.prompts):
            self.notes.append(f"prompts above {engine.max_positions - plan.new_tokens} tokens do not fit the context")
        if not prompts or plan.new_tokens < 2 or plan.repeats < 1 or not plan.keeps:
            raise OptionError("a prompt that fits, --new-tokens 2, --repeats 1 and one keep ratio are needed at least")
        for keep in plan.keeps:
            keep_ratios(keep, engine.stages)
        rng = np.random.default_rng(plan.seed)
        rows = []
        for prompt in prompts:
            ids = rng.integers(0, engine.vocab_size, (1, prompt))
            self._cool(plan.cool, prompt)
            runs: dict[float, list[Run]] = {keep: [] for keep in plan.keeps}
            for round_ in range(plan.repeats + 1):
                for keep in plan.keeps:
                    run = once(self.generator.engine, ids, plan.new_tokens, keep, self.clock)
                    if round_:
                        runs[keep].append(run)
            for keep in plan.keeps:
                row = asdict(summary(keep, runs[keep], prompt, plan.new_tokens))
                row = {"prompt": prompt, **row, "spread": _spread(runs[keep])}
                rows.append(row | self._roofline(prompt, plan.new_tokens, keep) | self._power(ids, keep, plan))
        return rows

    def _roofline(self, prompt: int, new: int, keep: float) -> dict[str, Any]:
        """What the device's profile predicts."""
        if self.profile is None:
            return {"roofline": None}
        stages = self.generator.engine.stages
        counts = keep_counts(prompt, keep_ratios(keep, stages), stages)
        found = predict(self.profile, self.decoder, prompt, new, [stage.layer for stage in stages], counts)
        return {"roofline": {"ttft_s": found.ttft_s, "decode_tokens_per_s": found.decode_tokens_per_s}}

    def _power(self, ids: Any, keep: float, plan: Plan) -> dict[str, Any]:
        """Joules per token and mean watts of each rail, of prefill and decode apart; memory and heat beside them."""
        if self.meter is None:
            return {"power": None}
        phases, all_samples = {}, []
        for phase in ("prefill", "decode"):
            self.meter.start()
            runs: list[Run] = []
            until = self.clock() + plan.power_seconds
            while not runs or self.clock() < until:
                # Two tokens are the fewest with a decode step; its share of such a run is cut off below.
                runs.append(
                    once(self.generator.engine, ids, 2 if phase == "prefill" else plan.new_tokens, keep, self.clock)
                )
            samples = self.meter.stop()
            windows = [(r.began, r.prefilled) if phase == "prefill" else (r.first, r.ended) for r in runs]
            tokens = len(runs) * (ids.shape[1] if phase == "prefill" else plan.new_tokens - 1)
            phases[phase] = _phase(samples, windows, tokens)
            all_samples += samples
        if not all(phases.values()):
            self.notes.append(f"prompt {ids.shape[1]}, keep {keep:g}: too few power samples; raise --power-seconds")
        heat = [max(sample.temperatures.values()) for sample in all_samples if sample.temperatures]
        memory = [sample.ram_mb[0] for sample in all_samples if sample.ram_mb]
        return {
            "power": phases,
            "hottest_c": max(heat) if heat else None,
            "memory_mb": max(memory) if memory else None,
        }

    def _cool(self, limit: float, prompt: int) -> None:
        """Wait until the hottest zone is below the limit, or two minutes."""
        until = self.clock() + LONGEST_COOLING
        while self.facts.jetson and self.meter is not None:
            self.meter.start()
            self.sleep(1.0)
            heat = [max(sample.temperatures.values()) for sample in self.meter.stop() if sample.temperatures]
            if not heat or heat[-1] < limit:
                return
            if self.clock() > until:
                self.notes.append(f"prompt {prompt}: still above {limit:g} degrees Celsius after {LONGEST_COOLING:g} s")
                return


def _spread(runs: Sequence[Run]) -> float:
    """Relative interquartile range of the whole time; 0 for fewer than four runs."""
    times = [run.ended - run.began for run in runs]
    if len(times) < 4:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


def _phase(samples: Sequence[Sample], windows: Iterable[tuple[float, float]], tokens: int) -> dict[str, Any] | None:
    """Watts by rail and joules per token of the windows; None with too few samples in them."""
    joules: dict[str, float] = {}
    seconds, inside = 0.0, 0
    for began, ended in windows:
        seconds += ended - began
        inside += sum(began <= sample.time <= ended for sample in samples)
        for name, value in energy(samples, began, ended).items():
            joules[name] = joules.get(name, 0.0) + value
    if inside < LEAST_SAMPLES or not joules:
        return None
    total = joules.get("total")
    return {
        "watts": {name: value / seconds for name, value in sorted(joules.items())},
        "joules_per_token": None if total is None else total / tokens,
        "samples": inside,
    }


def result(bench: Bench, plan: Plan, rows: list[dict[str, Any]], name: str, engine: dict[str, Any]) -> dict[str, Any]:
    """Everything that a reader needs to judge the rows."""
    facts = bench.facts
    clock = facts.clock
    return {
        "format": "fstq-jetson-benchmark",
        "version": 1,
        "tool": f"fstq-infer {__version__}",
        "bundle": name,
        "engine": engine,
        "device": {
            **{
                key: value for key, value in as_json(facts, []).items() if key not in ("findings", "errors", "warnings")
            },
            "title": bench.profile.title if bench.profile else None,
            "roofline_mode": bench.profile.mode.name if bench.profile else None,
            "gpu_mhz": [clock.lowest / 1e6, clock.highest / 1e6] if clock else None,
            "clocks_locked": clock.lowest == clock.highest if clock else None,
            "warnings": [asdict(one) for one in examine(facts) if one.severity in ("error", "warning")],
        },
        "power_source": bench.meter.name if bench.meter else None,
        "plan": asdict(plan),
        "notes": bench.notes,
        "rows": _rounded(rows),
    }


def _rounded(value: Any) -> Any:
    """Numbers to six digits, as deep as they are."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def profile_for(facts: Facts, wanted: str | None) -> device.Profile | None:
    """The profile asked for, or the one of this device, in the power mode that is on."""
    profile = device.find(wanted) if wanted else facts.profile
    mode = facts.power.mode if facts.power else None
    if profile is not None and mode is not None and mode.casefold() in {key.casefold() for key in profile.modes}:
        return profile.in_mode(mode)
    return profile


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmark-out"), help="folder for results")
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)), help="prompt lengths, with commas")
    parser.add_argument("--keep", default=None, help="keep ratios, with commas; default: 1.0 and the bundle's")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--power", default="auto", help="auto, none, ina, tegrastats or jtop")
    parser.add_argument("--power-seconds", type=float, default=4.0, help="length of each power pass")
    parser.add_argument("--cool", type=float, default=60.0, help="wait for this temperature before each prompt length")
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--provider", default="cpu", help="of ONNX Runtime: cpu or cuda")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default=None, help="profile for the roofline column; default: this device's")
    given = parser.parse_args(arguments)
    try:
        _main(given)
    except (FstqError, OSError) as error:
        sys.exit(f"error: {error}")


def _main(given: argparse.Namespace) -> None:
    env = Machine()
    facts = gather(env)
    meter = choose(env, given.power) if facts.jetson else None
    if facts.jetson is None:
        print("This is no Jetson: running on its CPU, without power.", file=sys.stderr)
    bundle = Bundle.open(given.bundle, checksums=False)
    try:
        prompts = tuple(int(part) for part in given.prompts.split(","))
        keeps = None if given.keep is None else tuple(float(part) for part in given.keep.split(","))
    except ValueError as error:
        raise OptionError(f"--prompts and --keep take numbers with commas: {error}") from None
    last = bundle.manifest.pruning.keep
    default = (1.0,) if not bundle.manifest.stages else (1.0, last[-1] if isinstance(last, tuple) else last)
    plan = Plan(
        prompts,
        keeps or tuple(dict.fromkeys(default)),
        given.new_tokens,
        given.repeats,
        given.power_seconds,
        given.cool,
    )
    generator = Generator.load(given.bundle, backend=given.backend, threads=given.threads, provider=given.provider)
    bench = Bench(generator, env, facts, profile_for(facts, given.device), decoder_of(bundle), meter)
    rows = bench.run(plan)
    engine = {"backend": given.backend, "provider": given.provider, "machine": description(), "peak_rss": peak_rss()}
    content = result(bench, plan, rows, given.bundle.name, engine)
    given.out.mkdir(parents=True, exist_ok=True)
    replace_file(given.out / "benchmark.json", (json.dumps(content, indent=1) + "\n").encode())
    text = markdown(content)
    replace_file(given.out / "benchmark.md", text.encode())
    print(text)
    if not plot(content, given.out):
        print("no plots: matplotlib is not installed", file=sys.stderr)
    print(f"written: {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
