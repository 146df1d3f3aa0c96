"""fstq_export.demo.grow: a grown model computes what the smaller did, and blocked attention what torch's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the 'export' extra")
pytest.importorskip("transformers", reason="training needs the 'export' extra")

from fstq_export.demo import train  # noqa: E402
from fstq_export.demo.grow import CHUNK, chunked_attention, warm_start  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from fstq_infer.errors import OptionError  # noqa: E402


def model_of(**sizes: Any) -> LlamaForCausalLM:
    config: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**config | sizes, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("earlier")
    train.save(model_of(), train.train_tokenizer(3, 400), {}, out)
    return out


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 24},
        {"head_dim": 16},
        {"head_dim": 24},
        {"intermediate_size": 40},
        {"hidden_size": 40, "head_dim": 16, "intermediate_size": 30},
    ],
    ids=str,
)
def test_a_grown_model_computes_what_the_smaller_one_did(sizes: dict[str, int], earlier: Path) -> None:
    small = LlamaForCausalLM.from_pretrained(earlier, dtype=torch.float32)
    grown = model_of(**sizes)
    # What the new parts of the embeddings add to the norms is small only if they are.
    torch.nn.init.normal_(grown.get_input_embeddings().weight, std=1e-6)
    torch.nn.init.zeros_(grown.model.layers[0].self_attn.o_proj.weight)
    for layer in grown.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(part.weight, std=1e-6)
    warm_start(grown, train.train_tokenizer(3, 400), earlier)
    ids = torch.randint(2, 400, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(grown(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-3, rtol=1e-4)


def test_new_parts_can_be_learned(earlier: Path) -> None:
    """Where a product of two new parts is zero, only one of them may be, or neither would ever get a gradient."""
    grown = model_of(hidden_size=24, head_dim=16, intermediate_size=40)
    warm_start(grown, train.train_tokenizer(3, 400), earlier)
    ids = torch.randint(2, 400, (2, 30))
    for _ in range(2):  # a first step moves those next to which nothing was zero
        grown.zero_grad()
        torch.autograd.backward(grown(input_ids=ids, labels=ids).loss)
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter -= 0.01 * parameter.grad
    assert all(
        (parameter.grad != 0).float().mean() > 0.95
        for name, parameter in grown.named_parameters()
        if "embed" not in name
    )


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 3}, {"num_attention_heads": 4}, {"head_dim": 12}], ids=str)
def test_a_model_that_does_not_fit_is_refused(sizes: dict[str, int], earlier: Path) -> None:
    with pytest.raises(OptionError, match="heads or layers, or a head size"):
        warm_start(model_of(**sizes), train.train_tokenizer(3, 400), earlier)


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 7])
def test_blocks_of_queries_give_the_same_as_all_at_once(tokens: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2)
    found, _ = chunked_attention(torch.nn.Module(), query, key, value)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
