"""Time per decoded token outside the backend: everything between two calls of ONNX Runtime, sampling included.

python bench/overhead.py BUNDLE      half a minute; writes results/overhead.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import target, write

from fstq_infer import Generator

TOKENS, REPEATS = 64, 7


class Timed:
    """An ONNX Runtime session that notes the seconds spent inside each of its calls."""

    def __init__(self, session: Any) -> None:
        self.session, self.calls = session, list[float]()
        for name in dir(session):
            if name.startswith("run"):
                setattr(self, name, self._timed(getattr(session, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def _timed(self, run: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*arguments, **named)
            finally:
                self.calls.append(time.perf_counter() - began)

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    generator = Generator.load(parser.parse_args().bundle)
    engine: Any = generator.engine
    timed = Timed(engine._caches.graph.session)
    engine._caches.graph.session = engine._session = timed
    rows = []
    for name, options in {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 0},
    }.items():
        outside = []
        for _ in range(REPEATS):
            timed.calls.clear()
            result = generator.generate([5] * 64, max_tokens=TOKENS, **options)
            # From the first token to the last: the first call is the prefill.
            outside.append((result.timings.decode_s - sum(timed.calls[1:])) / (len(result.tokens) - 1))
        rows.append(
            {"name": name, "milliseconds_per_token": statistics.median(outside) * 1e3, "tokens": len(result.tokens)}
        )
    figures = {
        f"milliseconds per token outside the backend, {row['name']}": target(
            row["milliseconds_per_token"], 0.3, at_least=False
        )
        for row in rows
    }
    write("overhead", "python bench/overhead.py BUNDLE (Qwen2.5-0.5B shape)", rows, figures)


if __name__ == "__main__":
    main()
