"""A toy engine over the runtime's protocol, and a tiny byte-level tokenizer. No backend, no weights.

The toy's logits are a hash of what every layer group can see: (token, position) of all kept tokens. A wrong position,
a lost or foreign token, a wrong ``keep`` or a mixed-up cache therefore changes the text. :func:`simulate` computes the
same model without engine, cache, batch or padding.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fstq_infer.runtime.engine import Stage, Step
from fstq_infer.runtime.text import Tokenizer

Seen = tuple[tuple[int, int], ...]  # (token, position) in the order of positions

BOS, EOS = "<s>", "</s>"
SPECIALS = (BOS, EOS, "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache(maxsize=1)
def _trained() -> str:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIALS) + 24,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the tokens of the prompt that matter stay, the others leave " * 4], trainer)
    core.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))])
    return core.to_str()


def small_tokenizer() -> Tokenizer:
    """Bytes and 24 merges; adds a BOS. Its file truncates and pads, which the wrapper has to switch off."""
    core = tokenizers.Tokenizer.from_str(_trained())
    core.enable_truncation(7)
    core.enable_padding(length=9)
    return Tokenizer(core)


def token_id(text: str) -> int:
    (token,) = small_tokenizer().encode(text, special=False)
    return token


@dataclass(frozen=True)
class Toy:
    """What the toy model computes. allowed: the only ids it generates (all when empty); eos: one it likes a little."""

    vocab: int = 285
    seed: int = 0
    allowed: tuple[int, ...] = ()
    eos: int | None = None
    eos_rate: float = 0.0

    def logits(self, groups: Sequence[Seen]) -> np.ndarray:
        """(vocab,) from what each layer group sees."""
        rng = np.random.default_rng(zlib.crc32(repr((self.seed, tuple(groups))).encode()))
        logits = rng.standard_normal(self.vocab).astype(np.float32) * 3
        if self.allowed:
            masked = np.full(self.vocab, -50, np.float32)
            masked[list(self.allowed)] = logits[list(self.allowed)]
            logits = masked
        if self.eos is not None:
            logits[self.eos] = 60 if rng.random() < self.eos_rate else -60
        return logits


def score(token: int, position: int) -> int:
    """What the toy's probe thinks of a token."""
    return zlib.crc32(f"{token}@{position}".encode())


def prune(fed: Sequence[tuple[int, int]], columns: Sequence[int], keep: int, stage: Stage) -> list[int]:
    """Which of ``columns`` of the fed tokens stay: sink, window, then the highest scores."""
    inner = [c for c in columns if stage.sink <= c < len(fed) - max(stage.window, 1)]
    forced = [c for c in columns if c not in inner]
    inner.sort(key=lambda c: -score(*fed[c]))
    return sorted(forced + inner[: max(0, keep - len(forced))])


def simulate(toy: Toy, calls: Sequence[tuple[Sequence[int], Sequence[int]]], stages: Sequence[Stage]) -> np.ndarray:
    """Logits after calls of (ids, keep counts) that follow one another; positions are counted, nothing is cached."""
    groups: list[list[tuple[int, int]]] = [[] for _ in range(len(stages) + 1)]
    for ids, keep in calls:
        begin = len(groups[0])
        fed = [(token, begin + place) for place, token in enumerate(ids)]
        columns = list(range(len(fed)))
        groups[0] += fed
        for group, (stage, count) in enumerate(zip(stages, keep, strict=True), start=1):
            columns = prune(fed, columns, count, stage)
            groups[group] += [fed[c] for c in columns]
    return toy.logits([tuple(group) for group in groups])


@dataclass(frozen=True)
class ToyCache:
    rows: tuple[tuple[Seen, ...], ...]  # for each row, for each group

    @property
    def bytes(self) -> int:
        return 16 * sum(len(group) for row in self.rows for group in row)


@dataclass
class ToyEngine:
    """Strict about the contract: raises AssertionError for a call that a real engine would answer wrongly."""

    toy: Toy = field(default_factory=Toy)
    stages: tuple[Stage, ...] = ()
    max_positions: int = 256
    calls: list[tuple[int, int]] = field(default_factory=list)  # shapes of the ids fed
    fail_at: int | None = None  # number of the call that raises KeyboardInterrupt

    @property
    def vocab_size(self) -> int:
        return self.toy.vocab

    def empty_cache(self, batch: int) -> ToyCache:
        return ToyCache(tuple(tuple(() for _ in range(len(self.stages) + 1)) for _ in range(batch)))

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, keep: np.ndarray, cache: ToyCache) -> Step:
        batch, width = input_ids.shape
        assert input_ids.dtype == position_ids.dtype == keep.dtype == np.int64
        assert position_ids.shape == (batch, width)
        assert keep.shape == (batch, len(self.stages))
        assert len(cache.rows) == batch
        self.calls.append((batch, width))
        if self.fail_at == len(self.calls):
            raise KeyboardInterrupt
        logits, kept, rows = [], [], []
        for row in range(batch):
            real = int((position_ids[row] >= 0).sum())
            answer = self._row(input_ids[row], position_ids[row], real, keep[row], cache.rows[row])
            logits.append(self.toy.logits(answer[0]))
            rows.append(answer[0])
            kept.append([[c + width - real for c in columns] for columns in answer[1]])
        padded = []
        for stage in range(len(self.stages)):
            size = max(len(row[stage]) for row in kept)
            padded.append(np.array([[-1] * (size - len(row[stage])) + row[stage] for row in kept], np.int64))
        return Step(np.stack(logits), tuple(padded), ToyCache(tuple(rows)))

    def _row(
        self, ids: np.ndarray, positions: np.ndarray, real: int, keep: np.ndarray, seen: tuple[Seen, ...]
    ) -> tuple[tuple[Seen, ...], list[list[int]]]:
        pads = len(ids) - real
        assert real > 0
        assert (positions[:pads] == -1).all(), "padding is on the left"
        assert ((ids >= 0) & (ids < self.vocab_size)).all()
        assert ((positions[pads:] >= 0) & (positions[pads:] < self.max_positions)).all()
        fed = [(int(t), int(p)) for t, p in zip(ids[pads:], positions[pads:], strict=True)]
        columns = list(range(real))
        groups, kept = [seen[0] + tuple(fed)], []
        for group, (stage, count) in enumerate(zip(self.stages, keep, strict=True), start=1):
            if count < 0:  # the toy's score mass is the same for every token
                count = min(len(columns), max(stage.sink + stage.window, math.ceil(-int(count) / 1e6 * real)))
            assert min(real, stage.sink + stage.window) <= count <= len(columns), "keep must be raised by the caller"
            columns = prune(fed, columns, int(count), stage)
            assert len(columns) == count
            kept.append(columns)
            groups.append(seen[group] + tuple(fed[c] for c in columns))
        return tuple(groups), kept
