"""fstq_infer.fisher.scores: every strategy of the registry, and small cases worked out by hand."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from fstq_infer.errors import OptionError
from fstq_infer.fisher.scores import (
    BASELINES,
    SCORES,
    SINKS,
    TARGETS,
    Evidence,
    Gate,
    SnapKV,
    WindowAttention,
    computable,
    expected_attention,
)

HEADS, WINDOW = 3, 4
NEEDS = {
    "gate": "gate",
    "embedding": "embedding",
    "probe": "probe",
    "snapkv": "own",
    "key-norm": "key_norm",
    "expected-attention": "expected",
    "perplexity": "surprise",
}


def evidence(tokens: int, seed: int = 0) -> Evidence:
    rng = np.random.default_rng(seed)
    attention = rng.random((HEADS, min(WINDOW, tokens), tokens))
    attention /= attention.sum(-1, keepdims=True)
    return Evidence(attention, **{name: rng.random(tokens) for name in NEEDS.values()}, seed=seed)


def arrays(given: Evidence) -> list[np.ndarray]:
    return [getattr(given, field.name) for field in fields(given) if field.name != "seed"]


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("name", SCORES)
def test_every_score(name: str, tokens: int) -> None:
    given = evidence(tokens)
    before = [array.copy() for array in arrays(given)]
    scores = SCORES[name](given)
    assert scores.shape == (tokens,) and np.isfinite(scores).all()
    assert np.issubdtype(scores.dtype, np.floating)
    assert (scores == SCORES[name](given)).all()
    for array, old in zip(arrays(given), before, strict=True):
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
    part = Evidence(*(array[..., 20:] for array in arrays(given)), seed=given.seed)
    whole, cut = SCORES[name](given)[20:], SCORES[name](part)
    order = whole.argsort(kind="stable") if name == "recency" else None
    assert (order == cut.argsort(kind="stable")).all() if order is not None else (whole[3:] == cut[3:]).all()


@pytest.mark.parametrize(("name", "needed"), NEEDS.items())
def test_missing_evidence_is_named(name: str, needed: str) -> None:
    given = replace(evidence(5), **{needed: None})
    with pytest.raises(OptionError, match=f"'{needed}'"):
        SCORES[name](given)
    assert computable(SCORES, given) == [other for other in SCORES if other != name]


def test_names() -> None:
    assert set(BASELINES) | set(TARGETS) | {"probe"} == set(SCORES)
    assert computable(BASELINES, Evidence(evidence(5).attention)) == ["random", "recency", "last-token", "window"]


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


def test_published_by_hand() -> None:
    own, norm, surprise = np.array([0.2, 0.5, 0.3, 0.0]), np.array([3.0, 1.0, 2.0, 5.0]), np.array([9.0, 0.1, 4.0, 2.0])
    given = Evidence(ATTENTION, own=own, key_norm=norm, surprise=surprise)
    assert SnapKV(pool=3)(given).tolist() == [0.5, 0.5, 0.5, 0.3]
    assert SCORES["key-norm"](given).argsort().tolist() == [3, 0, 2, 1]  # the small key stays longest
    assert SCORES["perplexity"](given).tolist() == [4.0, 0.1, 4.0, 2.0]  # nothing predicts the first: it stays


def heads(tokens: int = 40, queries: int = 4, keys: int = 2, width: int = 3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(count, tokens, width)) for count in (queries, keys, keys))


def test_expected_attention_is_the_mean_over_sampled_queries() -> None:
    """Each query head attends the keys of its group; all values have norm 1."""
    queries, keys, values = heads()
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    rng, wanted = np.random.default_rng(1), np.zeros(keys.shape[1] - SINKS)
    for head, mine in enumerate(queries[:, SINKS:]):
        drawn = rng.multivariate_normal(mine.mean(0), np.cov(mine.T, bias=True), size=400_000)
        weights = np.exp(0.5 * drawn @ keys[head // 2, SINKS:].T).mean(0)
        wanted += weights / weights.sum() / len(queries)
    found = expected_attention(queries, keys, values, 0.5)
    assert found[SINKS:] == pytest.approx(wanted, rel=0.02)
    assert (found[:SINKS] == found[SINKS:].max()).all()


def test_expected_attention_of_equal_keys_is_uniform_but_for_the_values() -> None:
    queries, keys, values = heads()
    norms = np.linalg.norm(values, axis=-1).mean(0)[SINKS:]
    found = expected_attention(queries, np.ones_like(keys), values, 0.5)
    assert found[SINKS:] == pytest.approx(norms / len(norms))
    assert expected_attention(queries[:, :SINKS], keys[:, :SINKS], values[:, :SINKS], 0.5).tolist() == [0.0] * SINKS


def test_expected_attention_of_equal_queries_is_their_attention() -> None:
    _, keys, values = heads(keys=1)
    query = np.array([1.0, -2.0, 0.5])
    weights = np.exp(keys[0, SINKS:] @ query)
    found = expected_attention(np.broadcast_to(query, (2, 40, 3)), keys, np.ones_like(values), 1.0)
    assert found[SINKS:] == pytest.approx(weights / weights.sum() * 3**0.5)
