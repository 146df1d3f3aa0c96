"""Token masks: scores against autograd's, ids kept by hand, memory on disk, training with a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("safetensors", reason="token scores need the 'federated' extra")
pytest.importorskip("torch", reason="training needs the 'federated' extra")
pytest.importorskip("peft", reason="training needs the 'federated' extra")

import torch

from fstq_infer.errors import OptionError
from fstq_infer.federated.embeddings import embedding_gradients
from fstq_infer.federated.tokens import TokenFolder, TokenScores, TokenSettings, kept_ids
from fstq_infer.federated.train import IGNORED, Example, LoraTrainer, TrainSettings

from .test_train import examples, model

NAN = float("nan")


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_ids_kept_by_hand() -> None:
    scores, counts = f32(5, 1, NAN, 3, 9), f32(2, 4, 1, 2, 0)
    assert kept_ids(scores, counts, 0.25).tolist() == [True, False, True, False, True]
    assert kept_ids(scores, counts, 0.26).tolist() == [True, False, True, True, True]
    assert kept_ids(scores, counts, 1.0).all()
    assert kept_ids(f32(1, 1), f32(1, 1), 0.5).tolist() == [True, False]  # ties: the lower id
    assert kept_ids(f32(NAN, NAN), f32(0, 3), 0.1).all()


@given(
    arrays(np.float32, 30, elements=st.floats(0, 100, width=32)),
    arrays(np.float32, 30, elements=st.floats(0.125, 10, width=32)),
    st.floats(0.01, 1.0),
)
def test_kept_ids_hold_the_share_and_no_lower_score_than_one_left_out(
    scores: np.ndarray, counts: np.ndarray, keep: float
) -> None:
    kept = kept_ids(scores, counts, keep)
    assert counts[kept].sum(dtype=np.float64) >= keep * counts.sum(dtype=np.float64) * (1 - 1e-6)
    assert kept.all() or scores[kept].min() >= scores[~kept].max()


def test_running_means_and_refreshes_by_hand() -> None:
    tokens = TokenScores(TokenSettings(keep=0.5, every=2, decay=0.5), 4)
    tokens.after_step(np.array([1, 1, 2]), f32(2, 4, 8), np.array([1, 2, 2]))
    assert tokens.scores.tolist()[1:3] == [3.0, 8.0] and np.isnan(tokens.scores[[0, 3]]).all() and tokens.kept.all()
    tokens.after_step(np.array([1, 3]), f32(7, 1), np.array([1, 3, 3]))
    assert tokens.scores.tolist()[1:] == [5.0, 8.0, 1.0]
    assert tokens.counts.tolist() == [0.0, 0.75, 0.5, 1.0]
    assert tokens.kept.tolist() == [True, True, True, False]  # 2 and 1 hold 1.25 of 2.25 labels
    assert tokens.masked((1, IGNORED, 3), IGNORED) == (1, IGNORED, IGNORED)


def test_embedding_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(1)
    trainer, ids = LoraTrainer(model(), rank=4), torch.arange(10)[None]
    trainer.load({name: np.random.default_rng(0).normal(0, 0.1, a.shape) for name, a in trainer.arrays().items()})
    with embedding_gradients(trainer.model) as norms:
        trainer.model(input_ids=ids, labels=ids).loss.backward()
    embedded = trainer.model.get_input_embeddings()(ids).detach().requires_grad_()
    trainer.model(inputs_embeds=embedded, labels=ids).loss.backward()
    assert embedded.grad is not None
    np.testing.assert_allclose(norms()[0], embedded.grad.square().sum(-1), rtol=1e-4)


def test_a_mask_that_keeps_all_changes_nothing_and_micro_batches_do_not_matter() -> None:
    found = []
    for keep, batch, accumulate in ((None, 8, 1), (1.0, 8, 1), (1.0, 2, 4)):
        torch.manual_seed(1)
        tokens = None if keep is None else TokenScores(TokenSettings(keep, every=1), 40)
        done = LoraTrainer(model(), rank=4).train(examples(), TrainSettings(3, batch, accumulate), 5, tokens)
        found.append((done, tokens))
    for name, values in found[0][0].arrays.items():
        assert np.array_equal(values, found[1][0].arrays[name])
        np.testing.assert_allclose(values, found[2][0].arrays[name], atol=2e-5)
    assert found[1][1] and found[2][1]
    np.testing.assert_allclose(found[1][1].scores, found[2][1].scores, rtol=1e-3, atol=1e-6)


def test_masked_loss_and_fisher_are_of_the_tokens_that_are_left() -> None:
    """A mask set by hand: the same as training on examples whose labels were left out by hand."""
    results = []
    for by_mask in (True, False):
        torch.manual_seed(1)
        tokens = TokenScores(TokenSettings(0.5, every=100), 40)
        tokens.kept[::2] = False
        rows = examples()
        if not by_mask:
            rows = [Example(row.tokens, tuple(IGNORED if t % 2 == 0 else t for t in row.labels)) for row in rows]
        trainer = LoraTrainer(model(), rank=4)
        results.append(trainer.train(rows, TrainSettings(3, 6), 5, tokens if by_mask else None))
    for name in results[0].arrays:
        np.testing.assert_array_equal(results[0].arrays[name], results[1].arrays[name])
        np.testing.assert_array_equal(results[0].fisher[name], results[1].fisher[name])
    assert results[0].loss == results[1].loss and 0.3 < results[0].kept < 0.7 and results[1].kept == 1.0


def test_learns_with_half_of_the_tokens() -> None:
    torch.manual_seed(1)
    trainer, tokens = LoraTrainer(model(), rank=4), TokenScores(TokenSettings(0.5, every=2), 40)
    before = trainer.loss(examples())
    done = trainer.train(examples(), TrainSettings(12, 4, learning_rate=1e-2), 5, tokens)
    assert trainer.loss(examples()) < 0.95 * before
    assert tokens.steps == 12 and 0 < (~tokens.kept).sum() < 40 and 0.4 < done.kept < 1.0


def test_a_step_without_any_kept_token_is_trained_whole() -> None:
    torch.manual_seed(1)
    tokens = TokenScores(TokenSettings(0.5, every=100), 40)
    tokens.kept[:] = False
    assert LoraTrainer(model(), rank=4).train(examples(), TrainSettings(2, 6), 5, tokens).kept == 1.0


def test_memory_goes_on_bit_for_bit_and_back_one_round(tmp_path: Path) -> None:
    folder, settings = TokenFolder(tmp_path), TokenSettings(0.5, 2)
    for round in (1, 2, 3):
        tokens = folder.load("a", settings, 4, "run", round)
        tokens.after_step(np.array([round]), f32(round), np.array([round]))
        folder.save("a", tokens, "run", round)
    again = folder.load("a", settings, 4, "run", 4)
    assert again.steps == 3 and np.array_equal(again.scores, tokens.scores, equal_nan=True)
    assert np.array_equal(again.kept, tokens.kept) and np.array_equal(again.counts, tokens.counts)
    assert folder.load("a", settings, 4, "run", 3).steps == 2
    for client, vocabulary, run in (("b", 4, "run"), ("a", 4, "other"), ("a", 5, "run")):
        assert folder.load(client, settings, vocabulary, run, 9).steps == 0
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert folder.load("a", settings, 4, "run", 4).steps == 0


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"every": 0}, {"decay": 1.0}])
def test_bad_settings(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        TokenSettings(**options)  # type: ignore[arg-type]
