"""Which tokens a client's loss is taken of: running embedding scores by token id, and a mask refreshed now and then.

The embedding score of a token is ||dL/de||^2, L the summed loss of a step and e the token's input embedding (Fed-FSTQ,
arXiv 2604.25421). A mask over ids, not places, carries over to texts that have not been seen. Knows no torch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.errors import OptionError, StateError
from fstq_infer.federated import saved

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
VERSION = 1


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """keep: share of labelled tokens whose loss counts. every: steps between two masks. decay: of running averages."""

    keep: float = 0.5
    every: int = 10
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.every < 1 or not 0 <= self.decay < 1:
            raise OptionError(
                f"keep {self.keep}, every {self.every}, decay {self.decay}: expected keep above 0 to 1, every at least "
                f"1, decay from 0 to below 1"
            )


class TokenScores:
    """Scores and mask of one client, for a vocabulary of V ids.

    scores: (V,) running mean of the embedding score, NaN where an id was never seen. counts: (V,) running number of
    labels in a step. kept: (V,) whose loss counts; all of them until the first refresh. steps: how many so far.
    """

    def __init__(self, settings: TokenSettings, vocabulary: int) -> None:
        self.settings = settings
        self.scores: Floats = np.full(vocabulary, np.nan, np.float32)
        self.counts: Floats = np.zeros(vocabulary, np.float32)
        self.kept: NDArray[np.bool_] = np.ones(vocabulary, bool)
        self.steps = 0

    def masked(self, labels: Sequence[int], ignored: int) -> tuple[int, ...]:
        """Labels with ``ignored`` where the mask leaves a token out."""
        return tuple(label if label == ignored or self.kept[label] else ignored for label in labels)

    def after_step(self, ids: Ints, scores: Floats, labels: Ints) -> None:
        """Take in a step. ids: (n,) input tokens, scores: (n,) of each, labels: (m,) before masking."""
        seen, place, times = np.unique(ids, return_inverse=True, return_counts=True)
        mean = (np.bincount(place, scores.astype(np.float64), len(seen)) / times).astype(np.float32)
        decay, old = np.float32(self.settings.decay), self.scores[seen]
        self.scores[seen] = np.where(np.isnan(old), mean, decay * old + (1 - decay) * mean)
        self.counts *= decay
        self.counts += (1 - decay) * np.bincount(labels, minlength=len(self.counts)).astype(np.float32)
        self.steps += 1
        if self.steps % self.settings.every == 0:
            self.kept = kept_ids(self.scores, self.counts, self.settings.keep)


def kept_ids(scores: Floats, counts: Floats, keep: float) -> NDArray[np.bool_]:
    """(V,) ids with the highest scores that together make up at least ``keep`` of all labels; ids without labels stay.

    scores: (V,), NaN for unseen. counts: (V,) labels of each id. Ties go to the lower id.
    """
    kept = np.isnan(scores) | (counts <= 0)
    known = np.flatnonzero(~kept)
    order = known[np.argsort(-scores[known], kind="stable")]
    share = np.cumsum(counts[order], dtype=np.float64)
    if len(order):
        kept[order[: int(np.searchsorted(share, keep * share[-1] * (1 - 1e-9))) + 1]] = True
    return kept


@dataclass(frozen=True, slots=True)
class TokenFolder:
    """Token scores of any number of clients on disk, two generations each: see memory.MemoryFolder."""

    path: Path

    def load(self, client: str, settings: TokenSettings, vocabulary: int, run: str, before: int) -> TokenScores:
        """The newest from an earlier round than ``before`` of this run; new ones where there is none that fits."""
        found = [self._read(path, settings, vocabulary, client, run) for path in self._paths(client)]
        usable = [item for item in found if item is not None and item[0] < before]
        newest = max(usable, key=lambda item: item[0], default=None)
        return TokenScores(settings, vocabulary) if newest is None else newest[1]

    def save(self, client: str, tokens: TokenScores, run: str, round: int) -> None:
        """Write in place of the older generation. Raises StateError when it cannot be written."""
        arrays: dict[str, NDArray[Any]] = {
            "scores": tokens.scores,
            "counts": tokens.counts,
            "kept": tokens.kept.astype(np.uint8),
        }
        facts: dict[str, Any] = {
            "version": VERSION,
            "client": client,
            "run": run,
            "round": round,
            "steps": tokens.steps,
        }
        first, second = self._paths(client)
        saved.save(saved.older(first, second, round), arrays, facts)

    def _paths(self, client: str) -> tuple[Path, Path]:
        name = f"tokens-{hashlib.sha256(client.encode()).hexdigest()[:24]}"
        return self.path / f"{name}-a.safetensors", self.path / f"{name}-b.safetensors"

    def _read(
        self, path: Path, settings: TokenSettings, vocabulary: int, client: str, run: str
    ) -> tuple[int, TokenScores] | None:
        try:
            arrays, facts = saved.load(path)
            if [facts.get(key) for key in ("version", "client", "run")] != [VERSION, client, run]:
                return None
            tokens = TokenScores(settings, vocabulary)
            for name, kind in (("scores", np.float32), ("counts", np.float32), ("kept", np.uint8)):
                if arrays[name].shape != (vocabulary,) or arrays[name].dtype != kind:
                    raise StateError(f"{path} is damaged: '{name}' is {arrays[name].dtype} {arrays[name].shape}.")
            tokens.scores, tokens.counts = arrays["scores"], arrays["counts"]
            tokens.kept, tokens.steps = arrays["kept"].astype(bool), int(facts["steps"])
            return int(facts["round"]), tokens
        except FileNotFoundError:
            return None
        except (StateError, KeyError, TypeError, ValueError) as error:
            log.warning("token scores of client %r are lost, they begin anew: %s", client, error)
            return None
