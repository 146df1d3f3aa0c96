"""Train the demo model from a seed: ``python -m fstq_export.demo.train --out DIR``.

First full language-model loss on repetitive narratives, until copying from the context appears; then narratives and
questions together with short contexts; then questions with growing contexts. Sparse question labels from scratch do
not teach retrieval. ``--start`` goes on from a checkpoint with questions alone. training.json beside the model holds
the recipe and log of each stage; `make train-demo` repeats the committed model's two stages (an hour and a half).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fstq_export.demo import facts

BOS, EOS = "<s>", "</s>"
LOG, EXACT_AT = "training.json", (100, 200, 350)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, besides library versions."""

    seed: int = 7
    vocabulary: int = 768
    width: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384
    positions: int = 2048
    tokens_per_step: int = 4096
    learning_rate: float = 2e-3
    tokens: int = 30_000_000
    longest: int = 1000


def train_tokenizer(seed: int, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text; digits stay single so that numbers can be copied digit by digit."""
    rng = random.Random(seed)
    texts = []
    for _ in range(3000):
        context, asked = facts.document(rng, rng.randrange(3, 12), rng.randrange(6), 3)
        texts.append(" ".join([context, *(f"{q} {a}" for q, a in asked)]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = (BOS, core.token_to_id(BOS))
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)


class Stream:
    """Batches of packed token rows; the loss mask is all ones (narratives) or weighted towards answers (questions)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.bos, self.eos = tokenizer.convert_tokens_to_ids([BOS, EOS])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def narrative(self, facts_at_most: int) -> tuple[list[int], list[float]]:
        ids = [self.bos, *self._ids(facts.narrative(self.rng, self.rng.randrange(2, facts_at_most + 1)))]
        return ids, [1.0] * len(ids)

    def questions(self, length: int) -> tuple[list[int], list[float]]:
        """A context of about ``length`` tokens, then questions; answers weigh 1, other tokens little."""
        n_facts = max(2, round(length / 18 * self.rng.uniform(0.5, 1.0)))
        n_fillers = max(0, round((length - 13 * n_facts) / 10))
        context, asked = facts.document(self.rng, n_facts, n_fillers, 8)
        ids = [self.bos, *self._ids(context)]
        weights = [0.1] * len(ids)
        for question, answer in asked:
            q, a = self._ids(" " + question), self._ids(" " + answer)
            ids, weights = ids + q + a, weights + [0.1] * len(q) + [1.0] * len(a)
        return [*ids, self.eos], [*weights, 0.1]

    def batch(self, rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), self.eos)
        weights = torch.zeros(len(rows), width)
        for i, (row, weight) in enumerate(rows):
            ids[i, : len(row)], weights[i, : len(row)] = torch.tensor(row), torch.tensor(weight)
        return ids, weights


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted next-token cross-entropy; ids and weights are (rows, tokens)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, count: int, split: str, seed: int
) -> dict[str, float]:
    """Share of questions whose whole answer is the greedy continuation (teacher-forced), by kind of question."""
    rng = random.Random(seed)
    hits: dict[str, list[bool]] = {}
    n_facts = max(2, round(tokens / 18 * 0.75))
    for _ in range(count):
        x = facts.item(rng, split, n_facts, max(0, round((tokens - 13 * n_facts) / 10)))
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(f"{x.context} {x.question}", add_special_tokens=False)]
        answer = tokenizer.encode(" " + x.answer, add_special_tokens=False)
        guess = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        hits.setdefault(x.kind, []).append(guess == answer)
        hits.setdefault("all", []).append(guess == answer)
    return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(hits.items())}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stages: list[dict[str, Any]], out: Path) -> None:
    """Model in half precision, tokenizer, and recipe and log of every stage so far."""
    clone = LlamaForCausalLM(model.config).half()
    clone.load_state_dict(model.state_dict())
    clone.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / LOG).write_text(json.dumps({"stages": stages}, indent=1) + "\n")


def train(recipe: Recipe, out: Path, start: Path | None = None) -> None:
    """Run the whole recipe; writes a checkpoint every few minutes."""
    torch.manual_seed(recipe.seed)
    tokenizer = (
        train_tokenizer(recipe.seed, recipe.vocabulary)
        if start is None
        else PreTrainedTokenizerFast.from_pretrained(start)
    )
    earlier = [] if start is None else json.loads((start / LOG).read_text())["stages"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.positions,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config) if start is None else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    stream, began = Stream(tokenizer, recipe.seed + 1), time.monotonic()
    log: list[dict[str, object]] = []
    step, seen, last_report = 0, 0, 0
    while seen < recipe.tokens:
        progress = seen / recipe.tokens
        rate = (
            recipe.learning_rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = stream.rng
        ramp = max(0.0, progress - 0.15) / 0.5 if start is None else progress / 0.3
        longest = 80 + (recipe.longest - 80) * min(1.0, ramp)
        ask = rng.random() < (0.3 if progress < 0.15 else 0.85) or start is not None
        length = rng.uniform(40, longest)
        rows = max(1, int(recipe.tokens_per_step / (length + (110 if ask else 4 * length))))
        ids, weights = stream.batch(
            [
                stream.questions(int(length)) if ask else stream.narrative(max(3, min(12, int(length / 12))))
                for _ in range(rows)
            ]
        )
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, ids, weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + int((weights > 0).sum())
        if seen - last_report > recipe.tokens / 30:
            last_report = seen
            model.eval()
            row: dict[str, object] = {
                "minutes": round((time.monotonic() - began) / 60, 1),
                "step": step,
                "tokens": seen,
                "loss": round(loss.item(), 4),
            }
            row |= {f"exact_{n}": exact_match(model, tokenizer, n, 40, "valid", 11) for n in EXACT_AT}
            model.train()
            log.append(row)
            _log.info(json.dumps(row))
            save(model, tokenizer, [*earlier, {"recipe": asdict(recipe), "log": log}], out)
    save(model, tokenizer, [*earlier, {"recipe": asdict(recipe), "log": log}], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=Recipe().tokens)
    parser.add_argument("--longest", type=int, default=Recipe().longest, help="longest context in tokens, about")
    parser.add_argument("--rate", type=float, default=Recipe().learning_rate, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        seed=arguments.seed, tokens=arguments.tokens, longest=arguments.longest, learning_rate=arguments.rate
    )
    train(recipe, arguments.out, arguments.start)


if __name__ == "__main__":
    main()
