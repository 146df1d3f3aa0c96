"""fstq_export.continuation: plain texts are labelled with the model's own greedy continuation."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("transformers", reason="transformers is not installed; it comes with the 'export' extra")

import torch
import transformers
from fstq_export.continuation import with_continuations

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.gates import observe
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item

POSITIONS, TOKENS = 64, 9
SHARED = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
}
FAMILIES = {
    "Llama": SHARED,
    "Qwen2": SHARED,
    "Gemma2": SHARED | {"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": False},
}
PROMPTS = [tuple((7 * n + 3 * i) % 58 + 2 for i in range(n)) for n in (20, 3, 11, 1, 30, 12)]


def tiny(family: str = "Llama") -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    config._attn_implementation = "eager"
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)


def generated(model: Any, prompt: tuple[int, ...], tokens: int = TOKENS, **options: Any) -> tuple[int, ...]:
    """One prompt through Transformers' own greedy search."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_continuation_is_the_greedy_one(family: str) -> None:
    model = tiny(family)
    done: list[int] = []
    found = with_continuations(Decoder.of(model), [Item(p, ()) for p in PROMPTS], TOKENS, POSITIONS, done.append)
    assert found == [Item(prompt, generated(model, prompt)) for prompt in PROMPTS]
    assert len({item.answer for item in found}) > 3  # the model does not say the same to all
    assert done[-1] == len(PROMPTS)


def test_labels_are_exact_for_the_dense_model() -> None:
    decoder = Decoder.of(tiny())
    labelled = with_continuations(decoder, [Item(p, ()) for p in PROMPTS], TOKENS, POSITIONS)
    assert all(seen.exact for seen in observe(decoder, labelled, (1,), 4))


@pytest.mark.parametrize("as_list", [False, True])
def test_continuation_stops_at_the_end_of_text(as_list: bool) -> None:
    model = tiny()
    answers = [generated(model, prompt) for prompt in PROMPTS]
    stop = answers[0][3]
    model.generation_config.eos_token_id = [stop, 1] if as_list else stop
    found = with_continuations(Decoder.of(model), [Item(p, ()) for p in PROMPTS], TOKENS, POSITIONS)
    for item, prompt, answer in zip(found, PROMPTS, answers, strict=True):
        end = answer.index(stop) + 1 if stop in answer else TOKENS
        if 1 in answer and as_list:
            end = min(end, answer.index(1) + 1)
        assert item == Item(prompt, answer[:end])
    assert found[0].answer[-1] == stop and len(found[0].answer) <= 4
    assert any(len(item.answer) == TOKENS for item in found)


def test_settings_for_generation_do_not_change_the_labels() -> None:
    """Checkpoints bring a repetition penalty and sampling; labels are the argmax of the logits all the same."""
    model = tiny()
    wanted = [generated(model, prompt) for prompt in PROMPTS]
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, min_new_tokens=4)
    assert [generated(model, prompt) for prompt in PROMPTS] != wanted
    found = with_continuations(Decoder.of(model), [Item(p, ()) for p in PROMPTS], TOKENS, POSITIONS)
    assert [item.answer for item in found] == wanted


def test_items_with_an_answer_stay() -> None:
    model = tiny()
    items = [Item(PROMPTS[0], (5, 6)), Item(PROMPTS[1], ()), Item(PROMPTS[2], (7,))]
    found = with_continuations(Decoder.of(model), items, TOKENS, POSITIONS)
    assert found[0] is items[0] and found[2] is items[2]
    assert found[1] == Item(PROMPTS[1], generated(model, PROMPTS[1]))
    assert with_continuations(Decoder.of(model), [items[0]], POSITIONS, POSITIONS) == [items[0]]
    assert with_continuations(Decoder.of(model), [], TOKENS, POSITIONS) == []


def test_long_prompts_lose_their_beginning() -> None:
    model = tiny()
    prompt = tuple(i % 58 + 2 for i in range(POSITIONS + 5))
    for tokens in (TOKENS, 1, POSITIONS - 1):
        (found,) = with_continuations(Decoder.of(model), [Item(prompt, ())], tokens, POSITIONS)
        assert found.prompt == prompt[-(POSITIONS - tokens) :]
        assert found.answer == generated(model, found.prompt, tokens)
    with pytest.raises(CalibrationDataError, match="no room"):
        with_continuations(Decoder.of(model), [Item(prompt, ())], POSITIONS, POSITIONS)
