"""Does the written graph compute what the model does? Dense against Transformers, pruned against the torch reference.

Always run before a bundle is committed: prefill of a left-padded batch, then decode steps fed one token at a time, compared layer
by layer so that a mismatch is named by the layer where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fstq_export import segments
from fstq_infer.errors import VerificationError
from fstq_infer.fisher.hooks import Decoder, Seen, watch
from fstq_infer.fisher.probe import Probe, ProbeInput
from fstq_infer.fisher.prune import NEVER
from fstq_infer.fisher.select import keep_count, select
from fstq_infer.runtime.engine import Stage

TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
DECODE_STEPS = 16
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Verification:
    """Largest differences, in units of the compared tensor's standard deviation where that is above 1.

    by_layer: of each layer's output, dense. kept_equal: whether graph and torch kept the same tokens in every row and stage.
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
    """A left-padded batch of prompts with the tokens that follow them: ids (B, n + steps), lengths of the prompts (B,)."""

    ids: Int64
    lengths: Int64
    prompt: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], following: Int64) -> Text:
        """prompts of any length; following: (B, steps) ids fed after them."""
        prompt = max(map(len, prompts))
        ids = np.zeros((len(prompts), prompt), np.int64)
        for row, tokens in enumerate(prompts):
            ids[row, prompt - len(tokens) :] = tokens
        return cls(np.concatenate([ids, following], 1), np.array([len(p) for p in prompts]), prompt)

    @property
    def positions(self) -> Int64:
        """(B, n + steps), -1 where padded."""
        start = self.prompt - self.lengths[:, None]
        return np.maximum(np.arange(self.ids.shape[1])[None] - start, -1)

    def calls(self, keep: Int64 | None) -> list[dict[str, NDArray[Any]]]:
        """Engine calls: the whole prompt, then token by token. keep: (B, stages) for the prompt."""
        cuts = [slice(0, self.prompt), *(slice(i, i + 1) for i in range(self.prompt, self.ids.shape[1]))]
        out: list[dict[str, NDArray[Any]]] = []
        for number, cut in enumerate(cuts):
            call: dict[str, NDArray[Any]] = {"input_ids": self.ids[:, cut], "position_ids": self.positions[:, cut]}
            if keep is not None:
                call["keep"] = keep if number == 0 else np.ones_like(keep)
            out.append(call)
        return out

    def forward(self, decoder: Decoder) -> torch.Tensor:
        """(B, steps + 1, vocab) logits that follow the prompt and each later token."""
        positions = self.positions
        output = decoder.model(
            input_ids=torch.from_numpy(self.ids),
            attention_mask=torch.from_numpy((positions >= 0).astype(np.int64)),
            position_ids=torch.from_numpy(np.maximum(positions, 0)),
            use_cache=False,
            logits_to_keep=self.ids.shape[1] - self.prompt + 1,
        )
        logits: torch.Tensor = output.logits
        return logits.float()


def difference(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest absolute difference, over the standard deviation of ``wanted`` where that is above 1; inf if not finite."""
    if found.shape != wanted.shape:
        raise VerificationError(f"the graph gives shape {found.shape}, the reference {wanted.shape}")
    gap = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    return float(gap.max() / max(1.0, float(wanted.std()))) if np.isfinite(gap).all() else float("inf")


def check_dense(
    folder: Path, graph: str, decoder: Decoder, text: Text, stages: int, tolerance: float, name: str
) -> tuple[float, tuple[float, ...]]:
    """Compare at ``keep = S``; returns (logits difference, by layer). Raises VerificationError naming the first wrong layer."""
    layers = len(decoder.layers)
    with torch.no_grad(), watch(decoder, hidden=tuple(range(layers))) as seen:
        wanted = text.forward(decoder).numpy()
    valid = text.positions >= 0
    hidden = {i: state.float().numpy() for i, state in seen.hidden.items()}
    keep = np.full((len(text.ids), stages), text.prompt) if stages else None
    by_layer, logits = [0.0] * layers, float("inf")
    for label, results in segments.run(folder, graph, text.calls(keep)):
        if label == segments.TAIL:
            found = np.concatenate([r["logits"] for r in results], 1)
            logits = difference(found, wanted)
        elif label.startswith("layer "):
            layer = int(label.split()[1])
            if layer + 1 < layers:
                states = np.concatenate([_residual(r, hidden[layer + 1].shape[-1]) for r in results], 1)
                by_layer[layer] = difference(states[valid], hidden[layer + 1][valid])
                if by_layer[layer] > tolerance:
                    raise VerificationError(
                        f"{name}: the exported graph differs from Transformers from decoder layer {layer} on: {by_layer[layer]:.2g} after it, "
                        f"at most {tolerance:.2g} is allowed. This model is not supported as it is; nothing was written"
                    )
    if logits > tolerance:
        raise VerificationError(
            f"{name}: the exported graph's logits differ from Transformers by {logits:.2g} (at most {tolerance:.2g} is allowed) although "
            "all layers before the last agree: the last layer, final norm or head differ. Nothing was written"
        )
    by_layer[-1] = logits
    return logits, tuple(by_layer)


def _residual(outputs: Mapping[str, NDArray[Any]], width: int) -> NDArray[Any]:
    """The one three-dimensional output of a layer that is as wide as the residual and no cache or query/key."""
    found = [
        v
        for k, v in outputs.items()
        if v.ndim == 3
        and v.shape[-1] == width
        and ".Attention" not in k
        and "self_attn" not in k
        and "/attn" not in k
        and ".attn." not in k
    ]
    return found[0]


def check_pruned(
    folder: Path,
    graph: str,
    decoder: Decoder,
    text: Text,
    stages: Sequence[Stage],
    probes: Sequence[Probe],
    keeps: Sequence[float],
    tolerance: float,
    name: str,
) -> tuple[float, bool]:
    """Compare a pruned run, one keep ratio per row; returns (logits difference, same tokens kept). Raises VerificationError."""
    keep = np.array(
        [
            [keep_count(int(n), ratio ** ((g + 1) / len(stages)), s.sink, s.window) for g, s in enumerate(stages)]
            for n, ratio in zip(text.lengths, keeps, strict=True)
        ]
    )
    kept: dict[int, Int64] = {}
    found = np.zeros(0)
    for label, results in segments.run(folder, graph, text.calls(keep)):
        if label.startswith("stage "):
            kept[int(label.split()[1])] = results[0][f"kept_indices.{label.split()[1]}"]
        elif label == segments.TAIL:
            found = np.concatenate([r["logits"] for r in results], 1)
    same: list[bool] = []
    total, prompt = text.ids.shape[1], text.prompt
    current = [np.arange(prompt - n, prompt) for n in text.lengths]

    def stage(number: int) -> Callable[[Seen], None]:
        def apply(seen: Seen) -> None:
            layer, sink, window = stages[number].layer, stages[number].sink, stages[number].window
            bias = torch.full((len(text.ids), total), 0.0)
            for row, columns in enumerate(current):
                x = ProbeInput.of(
                    seen.hidden[layer][row : row + 1, columns],
                    seen.hidden[0][row : row + 1, columns],
                    seen.attention[layer - 1][row : row + 1, :, columns[-window:]][..., columns],
                    torch.from_numpy(text.ids[row : row + 1, columns]),
                    torch.ones(1, len(columns), dtype=torch.bool),
                )
                scores = probes[number](x)[0].numpy()
                mine = columns[select(scores, int(keep[row, number]), sink, window)]
                theirs = kept[number + 1][row]
                theirs = theirs[theirs >= 0]
                same.append(
                    _same(
                        mine, theirs, dict(zip(columns.tolist(), scores.tolist(), strict=True)), name, layer, tolerance
                    )
                )
                current[row] = theirs
                bias[row, :prompt] = NEVER
                bias[row, theirs] = 0
            full = bias[:, None, None, :] * (1 - torch.eye(total))
            seen.bias.update(dict.fromkeys(range(layer, len(decoder.layers)), full))

        return apply

    with (
        torch.no_grad(),
        watch(
            decoder,
            hidden=(0, *(s.layer for s in stages)),
            attention=tuple(s.layer - 1 for s in stages),
            before={s.layer: stage(i) for i, s in enumerate(stages)},
        ),
    ):
        wanted = text.forward(decoder).numpy()
    gap = difference(found, wanted)
    if gap > tolerance:
        raise VerificationError(
            f"{name}: with token pruning the exported graph's logits differ from the torch reference by {gap:.2g} (at most {tolerance:.2g}), "
            f"though the dense graph agrees: the difference starts at a prune layer ({', '.join(str(s.layer) for s in stages)}). Nothing was written"
        )
    return gap, all(same)


def _same(mine: Int64, theirs: Int64, scores: Mapping[int, float], name: str, layer: int, tolerance: float) -> bool:
    """Whether both kept the same; a difference is forgiven only between tokens whose scores are level within the tolerance."""
    odd = sorted(set(mine.tolist()) ^ set(theirs.tolist()))
    if not odd:
        return True
    values = [scores.get(i, float("nan")) for i in odd]
    if len(mine) != len(theirs) or not max(values) - min(values) <= tolerance * max(1.0, abs(values[0])):
        raise VerificationError(
            f"{name}: graph and torch reference keep different tokens at prune layer {layer}: columns {odd[:8]} with scores "
            f"{[round(v, 4) for v in values[:8]]}. Nothing was written"
        )
    return False


def verify(
    folder: Path,
    graph: str,
    decoder: Decoder,
    stages: Sequence[Stage],
    probes: Sequence[Probe],
    vocab_size: int,
    max_positions: int,
    dtype: str,
    seed: int,
    name: str,
    prompts: Sequence[Sequence[int]] = (),
) -> Verification:
    """All checks. prompts: real ones to use beside random ids; long ones are cut to 256 tokens."""
    rng = np.random.default_rng(seed)
    longest = max(2, min(48, max_positions - DECODE_STEPS))
    forced = max((s.sink + s.window for s in stages), default=0)
    longest = max(longest, min(3 * forced, max_positions - DECODE_STEPS))
    chosen: list[Sequence[int]] = [rng.integers(0, vocab_size, n).tolist() for n in (longest, max(1, longest - 7))]
    chosen += [list(p)[: min(256, max_positions - DECODE_STEPS)] for p in prompts[:2]]
    text = Text.of(chosen, rng.integers(0, vocab_size, (len(chosen), DECODE_STEPS)))
    tolerance = TOLERANCE[dtype]
    dense, by_layer = check_dense(folder, graph, decoder, text, len(stages), tolerance, name)
    pruned, kept_equal = None, None
    if stages:
        keeps = [(0.5, 0.4, 0.7, 0.25)[i % 4] for i in range(len(chosen))]
        pruned, kept_equal = check_pruned(folder, graph, decoder, text, stages, probes, keeps, tolerance, name)
    return Verification(tolerance, dense, by_layer, pruned, kept_equal, len(chosen))
