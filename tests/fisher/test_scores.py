"""fstq_infer.fisher.scores: every strategy of the registry, and small cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fstq_infer.errors import OptionError
from fstq_infer.fisher.scores import BASELINES, SCORES, TARGETS, Evidence, Gate, WindowAttention

HEADS, WINDOW = 3, 4


def evidence(tokens: int, seed: int = 0) -> Evidence:
    rng = np.random.default_rng(seed)
    attention = rng.random((HEADS, min(WINDOW, tokens), tokens))
    attention /= attention.sum(-1, keepdims=True)
    return Evidence(attention, rng.random(tokens), rng.random(tokens), rng.normal(size=tokens), seed)


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("name", SCORES)
def test_every_score(name: str, tokens: int) -> None:
    given = evidence(tokens)
    before = [array.copy() for array in (given.attention, given.gate, given.embedding, given.probe)]
    scores = SCORES[name](given)
    assert scores.shape == (tokens,) and np.isfinite(scores).all()
    assert np.issubdtype(scores.dtype, np.floating)
    assert (scores == SCORES[name](given)).all()
    for array, old in zip((given.attention, given.gate, given.embedding, given.probe), before, strict=True):
        assert (array == old).all()


@pytest.mark.parametrize("name", SCORES)
def test_only_random_depends_on_the_seed(name: str) -> None:
    given = evidence(50)
    same = (SCORES[name](given) == SCORES[name](replace(given, seed=1))).all()
    assert same == (name != "random")


@pytest.mark.parametrize("name", [name for name in SCORES if name != "random"])
def test_scores_follow_their_tokens(name: str) -> None:
    """Scores are local: the last 30 tokens of 50 get theirs from their own evidence (away from the cut)."""
    given = evidence(50)
    assert given.gate is not None and given.embedding is not None and given.probe is not None
    part = Evidence(given.attention[..., 20:], given.gate[20:], given.embedding[20:], given.probe[20:], given.seed)
    whole, cut = SCORES[name](given)[20:], SCORES[name](part)
    order = whole.argsort(kind="stable") if name == "recency" else None
    assert (order == cut.argsort(kind="stable")).all() if order is not None else (whole[3:] == cut[3:]).all()


@pytest.mark.parametrize("name", ["gate", "embedding", "probe"])
def test_missing_evidence_is_named(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        SCORES[name](Evidence(evidence(5).attention))


def test_names() -> None:
    assert set(BASELINES) | set(TARGETS) | {"probe"} == set(SCORES)
    for name in BASELINES:  # they need nothing but attention
        SCORES[name](Evidence(evidence(5).attention))


ATTENTION = np.array([[[0.9, 0.1, 0.0], [0.2, 0.2, 0.6]], [[0.5, 0.5, 0.0], [0.4, 0.0, 0.6]]])  # 2 heads, 2 queries


def test_by_hand() -> None:
    given = Evidence(ATTENTION, gate=np.array([4.0, 1.0, 0.0]), embedding=np.array([0.0, 9.0, 1.0]))
    assert SCORES["recency"](given).tolist() == [0, 1, 2]
    assert SCORES["last-token"](given) == pytest.approx([0.3, 0.1, 0.6])
    assert WindowAttention(pool=1)(given) == pytest.approx([0.5, 0.2, 0.3])
    assert SCORES["window"](given) == pytest.approx([0.5, 0.5, 0.5])
    assert Gate(pool=1)(given).tolist() == [2, 1, 0]
    assert Gate(pool=3)(given).tolist() == [2, 2, 1]
    assert SCORES["embedding"](given).tolist() == [3, 3, 3]
