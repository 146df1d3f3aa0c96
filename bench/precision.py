"""What 5.0 bits per weight cost: the plan beside uniform int4, a last-layer rule and Fisher trace at equal bytes.

python bench/precision.py      half an hour on a quiet core; writes results/precision.json

--only demo or --only stories260k measures one model and leaves the other's rows as they are. The rules' codes are not
trained; "plan, codes not trained" is what to compare them with, format by format.

On the demo model (questions over contexts whose names calibration never saw) and on stories260k (its own samples, so
that the unquantized model is the best there is and any change costs).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, shared, target, write
from fstq_export import data, precision, reference, source, tune
from fstq_export.demo import facts
from fstq_export.demo.run import LENGTHS, MODEL
from fstq_export.demo.train import amounts
from fstq_export.reference import parameter_count
from fstq_export.wanted import Precision

from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item

FITTING, HELD = 1024, 192  # texts; an export fits small models to up to 1,350
LENGTH, AT_ONCE = 256, 128  # tokens of a sampled story; stories that are written together
MODELS = ("demo", "stories260k")
BITS, UNIFORM = 5.0, "uniform int4"


def questions(tokenizer: Any, split: str, count: int, seed: int) -> list[Item]:
    """Generated questions, as the demo asks them."""
    rng = random.Random(seed)
    made = (facts.item(rng, split, *amounts(rng.randint(*LENGTHS))) for _ in range(count))
    return [data.encode(tokenizer, data.Example(f"{i.context} {i.question}", i.answer)) for i in made]


@torch.no_grad()
def stories(decoder: Decoder, count: int, seed: int) -> list[Item]:
    """Texts that the model writes itself at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = decoder.model.config
    written: list[Item] = []
    while len(written) < count:
        ids = current = torch.full((min(AT_ONCE, count - len(written)), 1), config.bos_token_id)
        cache = None
        while ids.shape[1] < LENGTH:
            output = decoder.model(input_ids=current, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            current = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, current], 1)
        written += [Item(tuple(row), ()) for row in ids.tolist()]
    return written


def told(step: str, done: int, total: int) -> None:
    """Now and then, how far it is."""
    if done % max(1, total // 4) == 0:
        print(f"{step}: {done} of {total}", file=sys.stderr, flush=True)


def compare(name: str, decoder: Decoder, fitting: list[Item], held: list[Item], steps: int) -> list[dict[str, Any]]:
    """Rows of the 5-bit plan and what rules make of its bytes, and of a plan within the bytes of uniform int4."""

    planner = precision.Planner(decoder, Precision(), "float32", 0, told)

    def run(wanted: Precision, rivals: bool = True) -> list[dict[str, Any]]:
        planner.wanted, planner.rivals = wanted, rivals
        found: list[dict[str, Any]] = planner.run(fitting, held).report["measured"]["rows"]
        return found

    rows = run(Precision("auto", bits=BITS, tune=steps))
    uniform = next(row for row in rows if row["name"] == UNIFORM)
    within = next(
        row for row in run(Precision("auto", bytes=uniform["bytes"], tune=0), rivals=False) if row["name"] == "plan"
    )
    rows = [{"model": name, **row} for row in (*rows, within | {"name": "plan, bytes of uniform int4"})]
    for row in rows:
        print(
            f"{name:12} {row['name']:28} {row['bits']:5.2f} bits  NLL {row['nll']:.4f} ({row['drop']:+.2%})  "
            f"divergence {row['divergence']:.5f}, predicted {row['damage']:.5f}"
        )
    return rows


def targets(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the rows of one model are held to."""
    by_name = {row["name"]: row for row in rows}
    name, plan, within = rows[0]["model"], by_name["plan"], by_name["plan, bytes of uniform int4"]
    found = {f"{name}: NLL at {BITS} bits, rise over fp32": target(plan["drop"], 0.01, at_least=False)}
    rounded = by_name["plan, codes not trained"]
    pairs = [(UNIFORM, plan), (UNIFORM, within), ("last layers", plan), ("Fisher trace", plan)]
    for rule, ours in (*pairs, ("last layers", rounded), ("Fisher trace", rounded)):
        beside = f"{name}: {ours['name']} over {rule}"
        for key in ("nll", "divergence"):
            found[f"{beside}, {key}"] = target(ours[key] / by_name[rule][key], 1.0, at_least=False)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--only", choices=MODELS)
    options.add_argument("--fitting", type=int, default=FITTING, help="texts to fit codes and formats to")
    options.add_argument("--steps", type=int, help="of training codes; default: as an export of that size takes")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    wanted: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(1)
    for name in MODELS:
        if given.only not in (None, name):
            before = json.loads((RESULTS / "precision.json").read_text(encoding="utf-8"))
            rows += [row for row in before["rows"] if row["model"] == name]
            wanted |= {what: figure for what, figure in before["targets"].items() if what.startswith(f"{name}: ")}
            continue
        folder = MODEL if name == "demo" else shared("models/stories260k")
        found = source.resolve(str(Path(folder)))
        with reference.reference(found, stream=False) as decoder:
            if name == "demo":
                tokenizer = source.tokenizer(found)
                fitting, held = questions(tokenizer, "valid", given.fitting, 1), questions(tokenizer, "test", HELD, 2)
            else:
                fitting, held = stories(decoder, given.fitting, 1), stories(decoder, HELD, 2)
            steps = given.steps or tune.default_steps(parameter_count(found.config))
            measured = compare(name, decoder, fitting, held, steps)
        rows += measured
        wanted |= targets(measured)
    write("precision", " ".join(["python bench/precision.py", *sys.argv[1:]]), rows, wanted)


if __name__ == "__main__":
    main()
