"""A roofline of decoder inference: what takes how long on a device, from bytes moved and operations done. Pure Python.

A kernel takes the longer of moving its bytes and doing its operations, each at the share of the peak that the profile
assumes (Williams et al., 2009); a decoder layer adds a fixed cost for its launches, a prefill another. Weights in few
bits that only save memory (int8, int4, fp8, nvfp4) compute in half precision; int8-dynamic computes as such, as does
nvfp4-w4a4, which other engines have and ours has not: published speeds are of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fstq_infer.device import Profile
from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import named

HALF = 2  # bytes of an activation and of a cached number
COMPUTES_IN = {"fp32": "fp32", "int8-dynamic": "int8", "nvfp4-w4a4": "fp4"}  # all others: fp16
PUBLISHED = {"nvfp4-w4a4": "nvfp4"}  # -> how weights are stored
SAME = {"int4-128-dynamic": "int4-128"}  # on devices: the int8 copy is for a CPU's kernels


def weight_bytes(n: int, k: int, format: str) -> int:
    """Of a matrix with n outputs and k inputs, scales counted. Raises OptionError for an unknown format."""
    return named(PUBLISHED.get(format, format)).bytes(n, k)


def linear_seconds(profile: Profile, n: int, k: int, format: str, tokens: int) -> float:
    """Seconds of a linear layer with n outputs and k inputs for ``tokens`` tokens, without launch costs.

    Raises OptionError for a format that is unknown or that the device does not have.
    """
    format = SAME.get(format, format)
    moved = weight_bytes(n, k, format) + tokens * (n + k) * HALF
    if PUBLISHED.get(format, format) not in profile.formats:
        raise OptionError(f"{profile.title} (SM {profile.sm}) has no {format}; it has {', '.join(profile.formats)}")
    return _seconds(profile, moved, 2 * n * k * tokens, COMPUTES_IN.get(format, "fp16"))


def attention_seconds(profile: Profile, heads: int, kv_heads: int, width: int, queries: int, keys: int) -> float:
    """Seconds of scaled dot products over ``keys`` cached and new tokens, whole square; ``width``: of a head."""
    moved = HALF * width * (2 * kv_heads * keys + 2 * heads * queries)
    return _seconds(profile, moved, 4 * heads * width * queries * keys, "fp16")


def _seconds(profile: Profile, moved: float, operations: float, number: str) -> float:
    reached = profile.estimate
    return max(
        moved / (profile.mode.bandwidth * reached.bandwidth), operations / (profile.flops(number) * reached.compute)
    )


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix of n outputs and k inputs in a format; ``layer`` is None for the head, which sees one token a call.

    weight: its name; a matrix that is read twice is stored once.
    """

    n: int
    k: int
    format: str
    layer: int | None
    weight: str


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a prediction needs of a model.

    attention: for each layer (query heads, key heads, width of a head). stored: bytes of all weights.
    """

    linears: tuple[Linear, ...]
    attention: tuple[tuple[int, int, int], ...]
    stored: int
    hidden: int
    vocabulary: int

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.attention)

    @property
    def matrix_bytes(self) -> int:
        """Of the matrices, each counted once."""
        return sum({one.weight: weight_bytes(one.n, one.k, one.format) for one in self.linears}.values())

    def stored_as(self, format: str) -> Decoder:
        """The same model with all its matrices in another format. Raises OptionError for one that is unknown."""
        made = replace(self, linears=tuple(replace(one, format=format) for one in self.linears))
        return replace(made, stored=self.stored - self.matrix_bytes + made.matrix_bytes)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one prompt. Seconds, tokens/s and bytes.

    decode_tokens_per_s: in the middle of the answer. total_bytes: weights, cache, activations, runtime. free_bytes:
    what is left beside the operating system, below 0 when it does not fit.
    """

    prompt: int
    new: int
    kept: tuple[int, ...]
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    end_to_end_s: float
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    total_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it fits beside the operating system."""
        return self.free_bytes >= 0


def predict(
    profile: Profile, decoder: Decoder, prompt: int, new: int, stages: Sequence[int] = (), kept: Sequence[int] = ()
) -> Prediction:
    """Time and memory of a prompt and ``new`` >= 1 tokens.

    stages: the layers before which tokens leave, rising. kept: prompt tokens that stay after each of them.
    """
    tokens = [([prompt, *kept])[sum(layer >= stage for stage in stages)] for layer in range(decoder.layers)]
    prefill = profile.estimate.prefill_seconds + _call(profile, decoder, tokens, tokens)
    one = [1] * decoder.layers
    step = _call(profile, decoder, one, [count + new // 2 for count in tokens])
    cache = sum(
        2 * HALF * kv_heads * width * (count + new)
        for (_, kv_heads, width), count in zip(decoder.attention, tokens, strict=True)
    )
    widest = max((linear.n for linear in decoder.linears if linear.layer is not None), default=decoder.hidden)
    heads = max((heads for heads, _, _ in decoder.attention), default=1)
    activations = prompt * (4 * decoder.hidden + 2 * widest) * HALF + heads * prompt * prompt * HALF
    activations += 4 * decoder.vocabulary
    total = decoder.stored + cache + activations + profile.estimate.runtime_bytes
    return Prediction(
        prompt=prompt,
        new=new,
        kept=tuple(kept),
        ttft_s=prefill,
        prefill_tokens_per_s=prompt / prefill,
        decode_tokens_per_s=1 / step,
        end_to_end_s=prefill + (new - 1) * step,
        weights_bytes=decoder.stored,
        kv_bytes=cache,
        activation_bytes=activations,
        total_bytes=total,
        free_bytes=profile.memory - profile.estimate.system_bytes - total,
    )


def _call(profile: Profile, decoder: Decoder, tokens: Sequence[int], keys: Sequence[int]) -> float:
    """Seconds of one call: for each layer so many new tokens that attend to so many."""
    seconds = decoder.layers * profile.estimate.layer_seconds
    for linear in decoder.linears:
        count = 1 if linear.layer is None else tokens[linear.layer]
        seconds += linear_seconds(profile, linear.n, linear.k, linear.format, count)
    for (heads, kv_heads, width), new, cached in zip(decoder.attention, tokens, keys, strict=True):
        seconds += attention_seconds(profile, heads, kv_heads, width, new, cached)
    return seconds
