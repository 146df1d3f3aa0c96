"""Our engines beside what a user would pick instead: one machine, one run, one set of weights.

python bench/inference.py --peers PYTHON --work FOLDER          all shapes and prompts; hours on 2 cores, can be resumed
python bench/inference.py --shape tiny --prompts 64 --new 8     a try
python bench/inference.py --report                              results, table and plot from what was measured so far

PYTHON: an interpreter with transformers, onnxruntime-genai, onnx-ir, gguf and llama-cpp-python; default: this one.
A shape and a prompt length that were measured are not measured again (--again); where settings or versions were others,
nothing is. docs/performance.md tells the method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from artefacts import Maker
from case import Case
from common import RESULTS
from inference_report import DOCS, report
from lineup import CONTENDERS, Contender
from runs import Differs, finished, versions
from shapes import SHAPES

from fstq_infer.atomic import replace_file

PARTIAL = RESULTS / "inference-runs"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _shapes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    return names


def _measure_all(given: argparse.Namespace, chosen: tuple[Contender, ...], parser: argparse.ArgumentParser) -> None:
    """Everything that is not there yet; an error, before hours are spent, where something else is."""
    waiting: list[tuple[Case, Path]] = []
    try:
        found = versions(sys.executable, given.peers)
        wanted = {"new": given.new, "threads": given.threads, "rounds": given.rounds, "versions": found}
        for name in given.shape:
            maker = Maker(name, SHAPES[name], given.work.resolve() / name, given.peers)
            for prompt in given.prompts:
                path = given.runs / f"{name}-{prompt}.json"
                if not given.again and finished(path, wanted, (one.name for one in chosen)):
                    print(f"{path} is there already")
                    continue
                case = Case(maker, SHAPES[name], prompt, given.new, given.threads, given.rounds, chosen, found)
                waiting.append((case, path))
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(f"--peers {given.peers} is no Python that runs: {error}")
    except Differs as differs:
        parser.error(str(differs))
    for case, path in waiting:
        replace_file(path, (json.dumps(case.measure(), indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_shapes, default="0.5B,1.5B", help=", ".join(SHAPES))
    parser.add_argument("--prompts", type=_counts, default="256,1024,4096")
    parser.add_argument("--new", type=_count, default=64)
    parser.add_argument("--threads", type=_count, default=2)
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="folder of models, 8 GB for 0.5B")
    parser.add_argument(
        "--runs",
        type=Path,
        default=PARTIAL,
        help="folder of finished measurements; another one than the default is printed only",
    )
    parser.add_argument("--only", help="contenders whose names begin so, separated by commas")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    prefixes = tuple((given.only or "").split(","))
    chosen = tuple(contender for contender in CONTENDERS if contender.name.startswith(prefixes))
    if not chosen:
        parser.error(f"no contender begins with {given.only!r}; there are {', '.join(c.name for c in CONTENDERS)}")
    if given.only and given.runs == PARTIAL and not given.report:
        parser.error("--only would leave parts of a comparison; name another folder with --runs")
    if not given.report:
        _measure_all(given, chosen, parser)
    report(given.runs, DOCS if given.runs == PARTIAL else None)


if __name__ == "__main__":
    main()
