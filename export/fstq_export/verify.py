"""Does the written graph compute what the model does? Dense against Transformers, pruned against the torch reference.

Always run before a bundle is committed: prefill of a left-padded batch, then decode steps fed one token at a time,
compared layer by layer so that a mismatch is named by the layer where it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fstq_export import segments
from fstq_export.masks import check_masks
from fstq_export.rounding import Allowance, difference
from fstq_export.source import layer_windows
from fstq_infer.errors import VerificationError
from fstq_infer.fisher.hooks import Decoder, watch
from fstq_infer.fisher.items import Batch
from fstq_infer.fisher.probe import Probe
from fstq_infer.fisher.prune import pruning
from fstq_infer.fisher.select import mass_count, select
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import MILLION, keep_counts, keep_ratios

TOLERANCE = {"float32": 1e-3, "float16": 3e-2}
DECODE_STEPS = 16
ADAPTIVE = 600_000  # millionths of the score mass that an adaptive row keeps
LONGEST_RUN = 576  # a sliding window up to this length is run through, a longer one is compared as a mask
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Verification:
    """Largest differences, in units of the compared tensor's standard deviation.

    tolerance: the largest that had to be allowed. by_layer: of each layer's output, dense. kept_equal: whether both
    kept the same tokens in every row and stage.
    """

    tolerance: float
    dense: float
    by_layer: tuple[float, ...]
    pruned: float | None
    kept_equal: bool | None
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        pruned = None if self.pruned is None else {"logits": self.pruned, "kept_equal": self.kept_equal}
        return {
            "tolerance": self.tolerance,
            "dense": {"logits": self.dense, "by_layer": list(self.by_layer)},
            "pruned": pruned,
            "prompts": self.prompts,
            "decode_steps": DECODE_STEPS,
        }


@dataclass(frozen=True, slots=True)
class Text:
    """A left-padded batch of prompts with the tokens that follow them.

    ids: (B, prompt + steps). lengths: of the prompts, (B,). prompt: the longest of them.
    """

    ids: Int64
    lengths: Int64
    prompt: int
    more: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # inputs that every call gets, by name

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], following: Int64, more: Mapping[str, NDArray[Any]] | None = None
    ) -> Text:
        """prompts of any length; following: (B, steps) ids fed after them."""
        prompt = max(map(len, prompts))
        ids = np.zeros((len(prompts), prompt), np.int64)
        for row, tokens in enumerate(prompts):
            ids[row, prompt - len(tokens) :] = tokens
        return cls(np.concatenate([ids, following], 1), np.array([len(p) for p in prompts]), prompt, more or {})

    @property
    def positions(self) -> Int64:
        """(B, prompt + steps), -1 where padded."""
        start = self.prompt - self.lengths[:, None]
        return np.asarray(np.maximum(np.arange(self.ids.shape[1])[None] - start, -1), np.int64)

    def calls(self, keep: Int64 | None) -> list[dict[str, NDArray[Any]]]:
        """Engine calls: the whole prompt, then token by token. keep: (B, stages) for the prompt."""
        cuts = [slice(0, self.prompt), *(slice(i, i + 1) for i in range(self.prompt, self.ids.shape[1]))]
        out: list[dict[str, NDArray[Any]]] = []
        for number, cut in enumerate(cuts):
            call: dict[str, NDArray[Any]] = {"input_ids": self.ids[:, cut], "position_ids": self.positions[:, cut]}
            if keep is not None:
                call["keep"] = keep if number == 0 else np.ones_like(keep)
            out.append(call | dict(self.more))
        return out

    @property
    def batch(self) -> Batch:
        """The same for torch, the tokens that follow as answers."""
        positions = torch.from_numpy(self.positions)
        valid = positions >= 0
        return Batch(torch.from_numpy(self.ids), positions.clamp(min=0), valid, self.prompt, valid[:, self.prompt :])

    def forward(self, decoder: Decoder) -> NDArray[np.float32]:
        """(B, steps + 1, vocab) logits that follow the prompt and each later token."""
        batch = self.batch
        output = decoder.model(
            input_ids=batch.ids,
            attention_mask=batch.valid.long(),
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=self.ids.shape[1] - self.prompt + 1,
        )
        return np.asarray(output.logits.float().numpy(), np.float32)


def check_dense(
    folder: Path,
    graph: str,
    decoder: Decoder,
    text: Text,
    stages: int,
    tolerance: float,
    name: str,
    replaced: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[float, tuple[float, ...], float]:
    """Compare at ``keep = S``; returns (logits difference, by layer, what had to be allowed).

    Raises VerificationError naming the first wrong layer.
    """
    layers, valid = len(decoder.layers), text.positions >= 0

    def outputs() -> dict[str, NDArray[Any]]:
        with torch.no_grad(), watch(decoder, hidden=tuple(range(1, layers))) as seen:
            logits = text.forward(decoder)
        return {"logits": logits} | {f"layer {i - 1}": s.float().numpy()[valid] for i, s in seen.hidden.items()}

    allowance = Allowance(decoder, tolerance, outputs)
    keep = np.full((len(text.ids), stages), text.prompt) if stages else None
    by_layer: dict[int, float] = {}
    logits = float("inf")
    for segment, results in segments.run(folder, graph, text.calls(keep), replaced):
        if segment.label == segments.TAIL:
            logits = difference(np.concatenate([r["logits"] for r in results], 1), allowance.wanted["logits"])
        elif segment.residual is not None and (layer := int(segment.label.split()[1])) + 1 < layers:
            states = np.concatenate([r[segment.residual] for r in results], 1)
            by_layer[layer] = difference(states[valid], allowance.wanted[segment.label])
            tolerance = max(tolerance, allowance.of(segment.label, by_layer[layer]))
            if by_layer[layer] > tolerance:
                raise VerificationError(
                    f"{name}: the exported graph differs from Transformers from decoder layer {layer} on: "
                    f"{by_layer[layer]:.2g} after it, at most {tolerance:.2g} is allowed"
                    f"{allowance.advice(segment.label)}. This model is not supported as it is; nothing was written"
                )
    tolerance = max(tolerance, allowance.of("logits", logits))
    if logits > tolerance:
        raise VerificationError(
            f"{name}: the exported graph's logits differ from Transformers by {logits:.2g} (at most {tolerance:.2g} "
            f"is allowed{allowance.advice('logits')}) although all layers before the last agree: the last layer, final "
            "norm or head differ. Nothing was written"
        )
    return logits, tuple(by_layer.get(layer, logits) for layer in range(layers)), tolerance


class _Checked:
    """Chooses what the graph kept, after checking that the torch reference may keep it too."""

    def __init__(
        self,
        stages: Sequence[Stage],
        probes: Sequence[Probe | None],
        keep: Int64,
        kept: Mapping[int, Int64],
        text: Text,
        tolerance: float,
        name: str,
    ) -> None:
        self.stages, self.probes, self.keep, self.kept = stages, probes, keep, kept
        self.padding, self.tolerance, self.name = text.prompt - text.lengths, tolerance, name
        self.same: list[bool] = []

    def __call__(self, number: int, row: int, tokens: Int64, scores: NDArray[np.float32]) -> Int64:
        """Tokens that stay; raises VerificationError where torch would have kept other ones."""
        columns = self.kept[number + 1][row]
        theirs = np.asarray(columns[columns >= 0] - self.padding[row], np.int64)
        self.same.append(self._same(number, row, tokens, scores, theirs))
        return theirs

    def _same(self, number: int, row: int, tokens: Int64, scores: NDArray[np.float32], theirs: Int64) -> bool:
        """Whether both kept the same; other choices are forgiven only between scores level within the tolerance."""
        stage, where = self.stages[number], f"at prune layer {self.stages[number].layer}"
        if not np.isfinite(scores).all():
            raise VerificationError(f"{self.name}: the probe gives scores that are no numbers {where}. Nothing written")
        count = int(self.keep[row, number])
        if count < 0:  # a share of the mass; where a token more or less is within rounding, theirs is as good
            span = next(probe.span_size for probe in self.probes[number::-1] if probe is not None)
            shares = (-count / MILLION + delta for delta in (0, -1e-4, 1e-4))
            counts = [mass_count(scores, share, stage.sink, stage.window, span) for share in shares]
            count = len(theirs) if len(theirs) in counts else counts[0]
        mine = tokens[select(scores, count, stage.sink, stage.window)]
        odd = sorted(set(mine.tolist()) ^ set(theirs.tolist()))
        if not odd:
            return True
        by_token = dict(zip(tokens.tolist(), scores.tolist(), strict=True))
        values = [by_token.get(i, float("inf")) for i in odd]
        level = max(values) - min(values) <= self.tolerance * max(1.0, abs(values[0]))
        if len(mine) != len(theirs) or not level:
            raise VerificationError(
                f"{self.name}: graph and torch reference keep different tokens {where}: {odd[:8]} with scores "
                f"{[round(v, 4) for v in values[:8]]}. Nothing was written"
            )
        return False


def check_pruned(
    folder: Path,
    graph: str,
    decoder: Decoder,
    text: Text,
    stages: Sequence[Stage],
    probes: Sequence[Probe | None],
    keeps: Sequence[float],
    tolerance: float,
    name: str,
    replaced: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[float, bool, float]:
    """Compare a pruned run, one keep ratio per row, the last row adaptive.

    Returns (logits difference, same tokens kept, what had to be allowed).

    Raises VerificationError.
    """
    keep = np.array(
        [keep_counts(int(n), keep_ratios(ratio, stages), stages) for n, ratio in zip(text.lengths, keeps, strict=True)]
    )
    keep[-1] = -ADAPTIVE
    kept: dict[int, Int64] = {}
    found = np.zeros(0)
    for segment, results in segments.run(folder, graph, text.calls(keep), replaced):
        if segment.label.startswith("stage "):
            number = int(segment.label.split()[1])
            kept[number] = np.asarray(results[0][f"kept_indices.{number}"], np.int64)
        elif segment.label == segments.TAIL:
            found = np.concatenate([np.asarray(r["logits"], np.float32) for r in results], 1)
    checked = _Checked(stages, probes, keep, kept, text, tolerance, name)
    with pruning(decoder, text.batch, [s.layer for s in stages], checked, probes):
        allowance = Allowance(decoder, tolerance, lambda: {"logits": text.forward(decoder)})
        gap, same = difference(found, allowance.wanted["logits"]), all(checked.same)
        tolerance = allowance.of("logits", gap)
    if gap > tolerance:
        raise VerificationError(
            f"{name}: with token pruning the exported graph's logits differ from the torch reference by {gap:.2g} (at "
            f"most {tolerance:.2g}{allowance.advice('logits')}), though the dense graph agrees: the difference starts "
            f"at a prune layer ({', '.join(str(s.layer) for s in stages)}). Nothing was written"
        )
    return gap, same, tolerance


def verify(
    folder: Path,
    graph: str,
    decoder: Decoder,
    stages: Sequence[Stage],
    probes: Sequence[Probe | None],
    vocab_size: int,
    max_positions: int,
    dtype: str,
    seed: int,
    name: str,
    prompts: Sequence[Sequence[int]] = (),
    more: Mapping[str, NDArray[Any]] | None = None,
    replaced: Mapping[str, NDArray[Any]] | None = None,
) -> Verification:
    """All checks. probes: None for a stage that goes on with the scores of the stage before.

    prompts: real ones to use beside random ids; long ones are cut to 256 tokens. more: inputs of an adapter, or those
    that stand for none, which every call gets; replaced: weights that it brings for probes.
    """
    rng = np.random.default_rng(seed)
    config: Any = decoder.model.config
    windows = [w + 8 for w in layer_windows(config.get_text_config(decoder=True)) if w is not None]
    forced = max((s.sink + s.window for s in stages), default=0)
    limit = max(2, max_positions - DECODE_STEPS)
    longest = min(limit, max(48, 3 * forced, *(w for w in windows if w <= LONGEST_RUN), 0))
    chosen: list[Sequence[int]] = [rng.integers(0, vocab_size, n).tolist() for n in (longest, max(1, longest - 7))]
    chosen += [list(p)[: min(256, limit)] for p in prompts[:2] if len(p)]
    text = Text.of(chosen, rng.integers(0, vocab_size, (len(chosen), DECODE_STEPS)), more)
    tolerance = TOLERANCE[dtype]
    try:
        check_masks(decoder, name)
        dense, by_layer, tolerance = check_dense(folder, graph, decoder, text, len(stages), tolerance, name, replaced)
        pruned, kept_equal = None, None
        if stages:
            keeps = [(0.5, 0.4, 0.7, 0.25)[i % 4] for i in range(len(chosen))]
            pruned, kept_equal, tolerance = check_pruned(
                folder, graph, decoder, text, stages, probes, keeps, tolerance, name, replaced
            )
    except segments.SegmentError as error:
        raise VerificationError(f"{name}, {dtype}: {error}. Nothing was written") from error
    return Verification(tolerance, dense, by_layer, pruned, kept_equal, len(chosen))
