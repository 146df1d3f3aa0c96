"""Train the demo model from a seed: ``python -m fstq_export.demo.train --out DIR`` (an hour on two CPU cores).

Questions with growing contexts, the loss on answers only, narratives mixed in. It begins with a model that already
copies from its context (--start): sparse question labels do not teach that. From nothing, full language-model loss on
repetitive narratives has to come first, some ten million tokens of it (--narrative-tokens). Matrices are trained with
Muon. training.json beside the model holds recipe and log, those of the first weights too. The batch of a step depends
on the seed, the step and the tokens seen alone, so a run that was interrupted goes on from its checkpoint as if it had
not been.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fstq_export.demo import facts
from fstq_export.demo.grow import chunked_attention, warm_start
from fstq_infer.errors import OptionError

BOS, EOS = "<s>", "</s>"
LOG, CHECKPOINT = "training.json", "checkpoint.pt"
EXACT_AT = (128, 512, 1000)
FACT_TOKENS, FILLER_TOKENS, FACT_SHARE = 12.1, 9.4, 0.3  # tokens of a sentence; facts' share of a context
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, besides the first weights, library versions and the machine's number format.

    tokens, narrative_tokens: length of the whole run, and of its narrative start. From ramp_from to ramp_to tokens the
    contexts grow from ``shortest`` to ``longest`` at most; fact_share of them is facts, more than where the model is
    judged, so that there is more to ask about. decay: last part of the run, in which the rate falls.
    """

    seed: int = 7
    vocabulary: int = 2048
    width: int = 192
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 512
    positions: int = 2048
    tokens_per_batch: int = 4096
    batches: int = 2
    learning_rate: float = 3e-3
    tokens: int = 22_000_000
    narrative_tokens: int = 0
    ramp_from: int = 6_000_000
    ramp_to: int = 15_000_000
    shortest: int = 110
    longest: int = 1050
    questions: int = 32
    fact_share: float = 0.5
    decay: float = 0.3


def train_tokenizer(seed: int, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text; names split between their parts, so that unseen ones are like seen ones.

    Digits stay single so that numbers can be copied digit by digit.
    """
    rng = random.Random(seed)
    texts = []
    for _ in range(3000):
        context, asked = facts.document(rng, rng.randrange(3, 12), rng.randrange(6), 3)
        texts.append(" ".join([context, *(f"{q} {a}" for q, a in asked)]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(facts.NAME_TAIL), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
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


def amounts(tokens: int, share: float = FACT_SHARE) -> tuple[int, int]:
    """(facts, filler sentences) for a context of about ``tokens`` tokens, ``share`` of them in facts."""
    n_facts = max(2, round(tokens * share / FACT_TOKENS))
    return n_facts, max(0, round((tokens - FACT_TOKENS * n_facts) / FILLER_TOKENS))


Row = tuple[list[int], list[bool]]


class Batches:
    """The batch of every step: token rows and which of their tokens carry loss.

    A function of the seed, the step and the tokens seen before it alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.bos, self.eos = tokenizer.convert_tokens_to_ids([BOS, EOS])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def narrative(self, rng: random.Random, length: float) -> Row:
        """The same facts told four times; every token carries loss."""
        n_facts = rng.randrange(2, max(4, min(14, int(length / 30))))
        ids = [self.bos, *self._ids(facts.narrative(rng, n_facts))]
        return ids, [True] * len(ids)

    def questions(self, rng: random.Random, length: float) -> Row:
        """A context of about ``length`` tokens, then questions; answers carry loss."""
        n_facts, n_fillers = amounts(int(length), self.recipe.fact_share)
        n_facts = round(n_facts * rng.uniform(0.7, 1.4))
        context, asked = facts.document(rng, n_facts, n_fillers, self.recipe.questions)
        ids = [self.bos, *self._ids(context)]
        labels = [False] * len(ids)
        for question, answer in asked:
            q, a = self._ids(" " + question), self._ids(" " + answer)
            ids, labels = ids + q + a, labels + [False] * len(q) + [True] * len(a)
        return [*ids, self.eos], [*labels, True]

    def batch(self, step: int, part: int, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, tokens) ids, padded with the end token, and loss mask, after ``seen`` tokens of training."""
        recipe, rng = self.recipe, random.Random(f"{self.recipe.seed}/{step}/{part}")
        start = seen < recipe.narrative_tokens
        grown = min(1.0, max(0.0, (seen - recipe.ramp_from) / (recipe.ramp_to - recipe.ramp_from)))
        length = rng.uniform(20, recipe.shortest + (recipe.longest - recipe.shortest) * grown)
        tell = rng.random() < (0.7 if start else 0.1)
        if tell:
            length = rng.uniform(80, 400)
        rows: list[Row] = []
        while sum(len(ids) for ids, _ in rows) < recipe.tokens_per_batch:
            rows.append(self.narrative(rng, length) if tell else self.questions(rng, length))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), self.eos)
        labels = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (row, label) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row), torch.tensor(label)
        return ids, labels


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over the tokens that carry loss; ids and labels are (rows, tokens)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][labels[:, 1:]]
    return functional.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][labels[:, 1:]])


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, count: int, split: str, seed: int
) -> dict[str, float]:
    """Share of questions whose whole answer is the greedy continuation (teacher-forced), by kind of question."""
    rng = random.Random(seed)
    hits: dict[str, list[bool]] = {}
    for _ in range(count):
        x = facts.item(rng, split, *amounts(tokens))
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(f"{x.context} {x.question}", add_special_tokens=False)]
        answer = tokenizer.encode(" " + x.answer, add_special_tokens=False)
        guess = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        hits.setdefault(x.kind, []).append(guess == answer)
        hits.setdefault("all", []).append(guess == answer)
    return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(hits.items())}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], out: Path) -> None:
    """Model in half precision, tokenizer and training.json."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    config._attn_implementation = "sdpa"
    clone = LlamaForCausalLM(config).half()
    clone.load_state_dict(model.state_dict())
    clone.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / LOG).write_text(json.dumps(record, indent=1) + "\n")


def optimizers_of(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def _rate(recipe: Recipe, step: int, seen: int) -> float:
    """Warm-up over 200 steps, constant, then a linear fall to 2 % over the last part."""
    left = (recipe.tokens - seen) / (recipe.decay * recipe.tokens)
    return recipe.learning_rate * min(1.0, (step + 1) / 200, max(0.02, left))


def train(recipe: Recipe, out: Path, start: Path | None = None, evaluate_every: int = 1_000_000) -> None:
    """Run the recipe, from the weights in ``start`` if given; go on with it where ``out`` holds a checkpoint.

    Writes a checkpoint at every evaluation.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed, recipe.vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_size,
            max_position_embeddings=recipe.positions,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    AttentionInterface.register("chunked", chunked_attention)
    model.set_attn_implementation("chunked")
    before = {}
    if start is not None:
        warm_start(model, tokenizer, start)
        if (start / LOG).exists():
            before["before"] = json.loads((start / LOG).read_text(encoding="utf-8"))
    optimizers = optimizers_of(model, recipe.learning_rate)
    batches = Batches(tokenizer, recipe)
    state: dict[str, Any] = {"step": 0, "seen": 0, "minutes": 0.0, "log": []}
    if (out / CHECKPOINT).exists():
        state = torch.load(out / CHECKPOINT, weights_only=True)
        if state["recipe"] | {"tokens": recipe.tokens} != asdict(recipe):
            raise OptionError(f"{out} holds a run of another recipe; continue that one, or name an empty folder")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    step, seen, log = state["step"], state["seen"], state["log"]
    losses: list[float] = []
    began, reported = time.monotonic() - 60 * state["minutes"], seen
    # bfloat16 is emulated, and many times slower than float32, on processors without instructions for it.
    half = (
        torch.autocast("cpu", dtype=torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else nullcontext()
    )
    while seen < recipe.tokens:
        model.zero_grad()
        total, tokens = 0.0, 0
        for part in range(recipe.batches):
            ids, labels = batches.batch(step, part, seen)
            with half:
                loss = loss_of(model, ids, labels) / recipe.batches
            torch.autograd.backward(loss)
            total, tokens = total + loss.item(), tokens + ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = _rate(recipe, step, seen)
            optimizer.step()
        losses.append(total)
        step, seen = step + 1, seen + tokens
        if seen - reported >= evaluate_every or seen >= recipe.tokens:
            reported = seen
            minutes = (time.monotonic() - began) / 60
            row: dict[str, Any] = {"minutes": round(minutes, 1), "step": step, "tokens": seen}
            row["loss"] = round(sum(losses) / len(losses), 4)
            row |= {f"exact_{n}": exact_match(model, tokenizer, n, 60, "valid", 11) for n in EXACT_AT}
            log.append(row)
            losses.clear()
            _log.info(json.dumps(row))
            save(model, tokenizer, {"recipe": asdict(recipe), "log": log} | before, out)
            state = {"step": step, "seen": seen, "minutes": minutes, "log": log, "recipe": asdict(recipe)}
            state |= {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(state, out / (CHECKPOINT + ".new"))
            os.replace(out / (CHECKPOINT + ".new"), out / CHECKPOINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--start", type=Path, help="begin with the weights of this earlier model of the same shape")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"training needs torch 2.9 or newer; this is {torch.__version__}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())}), arguments.out, arguments.start)


if __name__ == "__main__":
    main()
