"""What makes the demo model's training affordable on CPUs: growing an earlier model (Net2Net, arXiv 1511.05641), and a
faster attention. Knows Llama models, no data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fstq_infer.errors import OptionError

CHUNK = 192  # queries


def chunked_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention in blocks of queries: half the time of torch's CPU kernel, forward and backward, at these sizes.

    query (rows, heads, tokens, size), key and value (rows, key heads, tokens, size). Returns what transformers expects:
    (rows, tokens, heads, size).
    """
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    query = (query * size**-0.5).view(rows, groups, heads // groups, tokens, size)
    later = torch.full((CHUNK, CHUNK), -torch.inf, dtype=query.dtype).triu_(1)
    out = []
    for start in range(0, tokens, CHUNK):
        end = min(tokens, start + CHUNK)
        block = query[:, :, :, start:end].reshape(rows, groups, -1, size)
        scores = (block @ key[:, :, :end].transpose(-1, -2)).view(rows, groups, -1, end - start, end)
        scores[..., start:] += later[: end - start, : end - start]
        weights = torch.softmax(scores, -1).view(rows, groups, -1, end)
        out.append((weights @ value[:, :, :end]).view(rows, groups, -1, end - start, size))
    return torch.cat(out, 3).view(rows, heads, tokens, size).transpose(1, 2), None


def warm_start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    """Take over the weights of an earlier model: as many heads and layers, but it may be narrower in all else.

    Tokens take their embedding from the same token where both vocabularies have it. The larger model computes nearly
    what the smaller did, as long as its new parts are small: what reads them begins at zero, what writes them as it was
    drawn. In a larger head the old rotary pairs go to the pairs of equal frequency. Raises OptionError for another
    number of heads or layers, and a head size that does not divide.
    """
    earlier = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    old, new = earlier.config, model.config
    width, inner = old.hidden_size, old.intermediate_size
    times, rest = divmod(new.head_dim, old.head_dim)
    if rest or (old.num_attention_heads, old.num_key_value_heads, old.num_hidden_layers) != (
        new.num_attention_heads,
        new.num_key_value_heads,
        new.num_hidden_layers,
    ):
        raise OptionError(f"{start} has another number of heads or layers, or a head size that does not divide")
    half = torch.arange(old.head_dim // 2) * times
    pairs = torch.cat([half, half + new.head_dim // 2])
    heads = {
        count: (torch.arange(count)[:, None] * new.head_dim + pairs).flatten()
        for count in (new.num_attention_heads, new.num_key_value_heads)
    }
    places = {
        name: (torch.arange(count)[:, None] * new.head_dim + torch.arange(old.head_dim)).flatten()
        for name, count in (("v_proj", new.num_key_value_heads), ("o_proj", new.num_attention_heads))
    }
    known = PreTrainedTokenizerFast.from_pretrained(start).get_vocab()
    tokens = [(new_id, known[token]) for token, new_id in tokenizer.get_vocab().items() if token in known]
    grown = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in earlier.named_parameters():
            target, part = grown[name], name.split(".")[-2]
            if part == "embed_tokens":
                for new_id, old_id in tokens:
                    target[new_id, :width] = value[old_id]
            elif value.ndim == 1:
                target.mul_((width / new.hidden_size) ** 0.5)
                target[:width] = value * (width / new.hidden_size) ** 0.5
            elif part in ("q_proj", "k_proj"):
                rows = heads[new.num_attention_heads if part == "q_proj" else new.num_key_value_heads]
                if part == "k_proj":
                    target.zero_()
                target[:, width:] = 0
                target[rows, :width] = value * (times**0.5 if part == "q_proj" else 1)
            elif part == "v_proj":
                target[:, width:] = 0
                target[places[part], :width] = value
            elif part == "o_proj":
                kept = target[width:].clone()
                target.zero_()
                target[width:] = kept
                target[:width, places[part]] = value
            elif part == "down_proj":
                target[:width, inner:] = 0
                target[:width, :inner] = value
            else:
                target[:, width:] = 0
                target[:inner, :width] = value
        model.model.norm.weight[width:] = 0
