"""Question answering over notes, with retrieval: the code of the tutorial in docs/tutorial/rag.md.

python rag.py notes --out rag                       writes notes, and questions about them
python rag.py calibration --out rag                 prompts as the retriever makes them, for `fstq export --calib`
python rag.py ask rag.bundle "Who ...?" --out rag   retrieves, prunes, answers
python rag.py measure rag.bundle --out rag          exact answers and seconds, dense against pruned
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

PASSAGES = 3  # that go into a prompt


class Retriever:
    """Okapi BM25 over passages (Robertson and Zaragoza, 2009)."""

    def __init__(self, passages: list[str], k1: float = 1.2, b: float = 0.75) -> None:
        self.passages, self.k1, self.b = passages, k1, b
        self.counts = [Counter(words(passage)) for passage in passages]
        self.lengths = [sum(count.values()) for count in self.counts]
        self.mean = statistics.mean(self.lengths)
        seen = Counter(word for count in self.counts for word in count)
        self.weight = {w: math.log(1 + (len(passages) - n + 0.5) / (n + 0.5)) for w, n in seen.items()}

    def best(self, question: str, count: int = PASSAGES) -> list[str]:
        """The passages that fit best, the best one last, next to the question."""
        asked = [word for word in words(question) if word in self.weight]
        scores = [sum(self._score(i, word) for word in asked) for i in range(len(self.passages))]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        return [self.passages[i] for i in reversed(order)]

    def _score(self, i: int, word: str) -> float:
        n, length = self.counts[i][word], self.lengths[i] / self.mean
        return self.weight[word] * n * (self.k1 + 1) / (n + self.k1 * (1 - self.b + self.b * length))


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def context_of(retriever: Retriever, question: str) -> str:
    """What stands before the question in a prompt."""
    return " ".join(retriever.best(question))


def read(path: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} lines")


def notes(folder: Path, count: int, seed: int) -> None:
    """Notes with made-up facts. Questions about one half are for calibration, those about the other are asked later."""
    from fstq_export.demo import facts

    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    passages: list[dict[str, Any]] = []
    asked: dict[str, list[dict[str, Any]]] = {"valid": [], "test": []}
    told: set[tuple[str, str]] = set()  # no two notes say different things of one subject
    while len(passages) < count:
        split = "valid" if len(passages) % 2 else "test"
        world = facts.World(rng, facts.LANGUAGES["en"], split, 4)
        subjects = {(fact.relation.name, fact.subject) for fact in world.facts}
        if subjects & told:
            continue
        told |= subjects
        passages.append({"text": world.text(3)})
        (question, answer, _), *_ = world.questions(1, ("single", "both"))
        asked[split].append({"question": question, "answer": answer})
    write(folder / "notes.jsonl", passages)
    write(folder / "train.jsonl", asked["valid"])
    write(folder / "test.jsonl", asked["test"])


def calibration(folder: Path) -> None:
    """The questions for calibration, each with the context that the retriever finds for it."""
    retriever = Retriever([row["text"] for row in read(folder / "notes.jsonl")])
    rows = [{"context": context_of(retriever, row["question"]), **row} for row in read(folder / "train.jsonl")]
    write(folder / "calibration.jsonl", rows)


def ask(bundle: Path, folder: Path, question: str, keep: Any) -> None:
    """Answer one question."""
    from fstq_infer import Generator

    retriever = Retriever([row["text"] for row in read(folder / "notes.jsonl")])
    prompt = f"{context_of(retriever, question)} Question: {question} Answer:"
    result = Generator.load(bundle).generate(prompt, keep=keep, max_tokens=24, stop=["."])
    seconds = result.timings.time_to_first_token_s
    print(f"{result.text.strip()}    ({len(result.kept)} of {len(result.prompt_tokens)} tokens kept, {seconds:.3f} s)")


def measure(bundle: Path, folder: Path, keeps: list[Any], count: int) -> None:
    """Questions that calibration has not seen, at every keep ratio in turn."""
    from fstq_infer import Generator

    retriever = Retriever([row["text"] for row in read(folder / "notes.jsonl")])
    generator = Generator.load(bundle)
    found: dict[Any, list[tuple[bool, float, float]]] = {keep: [] for keep in keeps}
    for row in read(folder / "test.jsonl")[:count]:
        prompt = f"{context_of(retriever, row['question'])} {row['question']}"
        for keep in keeps:
            result = generator.generate(prompt, keep=keep, max_tokens=24)
            right = result.text.strip().startswith(row["answer"])
            found[keep].append((right, result.timings.prefill_s, len(result.kept) / len(result.prompt_tokens)))
    print(f"{'keep':>6} {'kept':>6} {'right':>6} {'prefill ms':>11}")
    for keep, rows in found.items():
        right, seconds, kept = zip(*rows, strict=True)
        median = statistics.median(seconds) * 1e3
        print(f"{keep!s:>6} {statistics.mean(kept):6.0%} {statistics.mean(right):6.0%} {median:11.1f}")


def keep_of(text: str) -> Any:
    """A ratio, "auto", or None: the bundle's."""
    return text if text == "auto" else None if text == "default" else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Question answering over notes, with retrieval.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("notes", "calibration", "ask", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=Path("rag"), help="folder of notes and questions")
        if name == "notes":
            command.add_argument("--count", type=int, default=800, help="how many notes")
            command.add_argument("--seed", type=int, default=0)
        if name in ("ask", "measure"):
            command.add_argument("bundle", type=Path)
        if name == "ask":
            command.add_argument("question")
            command.add_argument("--keep", type=keep_of, default=None, help="a ratio, auto, or default: the bundle's")
        if name == "measure":
            command.add_argument("--keep", default="1.0,0.5,0.25", help="ratios, with commas; auto is one, too")
            command.add_argument("--questions", type=int, default=100)
    given = parser.parse_args()
    if given.command == "notes":
        notes(given.out, given.count, given.seed)
    elif given.command == "calibration":
        calibration(given.out)
    elif given.command == "ask":
        ask(given.bundle, given.out, given.question, given.keep)
    else:
        measure(given.bundle, given.out, [keep_of(part) for part in given.keep.split(",")], given.questions)


if __name__ == "__main__":
    main()
