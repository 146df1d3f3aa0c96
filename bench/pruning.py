"""Export cost and prefill speed on the Qwen2.5-0.5B shape (random weights; the shape decides speed).

python bench/pruning.py      about 5 minutes on 2 quiet cores; writes results/pruning.json
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import target, timed, write
from fstq_export import decoder, timing

from fstq_infer.bundle import Bundle

PROMPT, NEW, LAYER = 1024, 64, 6
SHAPES = Path(__file__).with_name("shapes.py")


def main() -> None:
    fstq = [sys.executable, "-m", "fstq_infer"]
    with tempfile.TemporaryDirectory(prefix="fstq-bench-") as scratch:
        work = Path(scratch)
        # The checkpoint is made in another process, so that its memory is not counted.
        timed([sys.executable, str(SHAPES), "0.5B", str(work / "model")])
        bundle = work / "model.bundle"
        export = [
            *fstq,
            "export",
            str(work / "model"),
            "--out",
            str(bundle),
            "--prune-layer",
            str(LAYER),
            "--keep",
            "0.25",
        ]
        seconds, peak = timed(export)
        build_seconds, build_peak = timed([*fstq, "build", str(bundle)])
        out = work / "bench.json"
        measured = [*fstq, "bench", str(bundle), "--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]
        timed([*measured, "--keep", "1.0,0.5,0.25", "--repeats", "5", "--json", str(out)])
        measured_report = json.loads(out.read_text())
        rows = measured_report["rows"]
        dense, pruned = rows[0], rows[2]
        stages = Bundle.open(bundle).manifest.stages
        prompt = np.random.default_rng(0).integers(0, 151936, PROMPT).tolist()
        times = timing.measure(bundle, decoder.GRAPH, 0, stages, 0.25, [prompt], 151936, 32768)
        probing = times["dense_probe_ms"] / sum(times["dense_ms"].values())
        rows.append({"times": times})
        shutil.rmtree(bundle)
    rows.append(
        {
            "export_seconds": seconds,
            "export_peak_rss": peak,
            "build_seconds": build_seconds,
            "build_peak_rss": build_peak,
            "bench_peak_rss": measured_report["peak_rss"],
        }
    )
    write(
        "pruning",
        "python bench/pruning.py",
        rows,
        {
            "export without calibration, seconds": target(seconds, 45, at_least=False),
            "probe and selection over dense prefill": target(probing, 0.02, at_least=False),
            "export peak RSS, GB": target(peak / 1e9, 2.5, at_least=False),
            "prefill at keep 25 % from layer L/4 over dense, fp32": target(
                dense["prefill_s"] / pruned["prefill_s"], 2.0
            ),
        },
    )


if __name__ == "__main__":
    main()
