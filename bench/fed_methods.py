"""Ways to send an update, as bench/federated.py compares them: each is charged for the bytes of real messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fstq_infer.federated import mosaic
from fstq_infer.federated.allocate import Everything, Fixed
from fstq_infer.federated.compress import Compressor, decompress
from fstq_infer.federated.feedback import ErrorFeedback, Forget, State
from fstq_infer.federated.mosaic import Part, Tile
from fstq_infer.federated.select import Magnitude
from fstq_infer.federated.tensors import TensorManifest

BASE = bytes(16)


@dataclass(frozen=True)
class Sending:
    """What a codec knows beside the delta: names as in the library."""

    manifest: TensorManifest
    fisher: Any
    state: State
    round: int
    slot: int
    slots: int


Codec = Callable[[Any, Sending], tuple[bytes, Part, State]]  # (N,) delta -> message, what it says, the next state


@dataclass(frozen=True)
class Method:
    """A row of the comparison. parts: which factors are trained and sent. momentum, server: FedAvgM's momentum and
    learning rate. average: of the weights that are delivered, see Server. downlink: bytes of a message of the server,
    0 for float32 weights. tokens: share of tokens whose loss counts. senders: see mosaic.complete. about: what it
    stands for.
    """

    codec: Codec
    about: str
    parts: str = "AB"
    momentum: float = 0.0
    server: float = 1.0
    average: float = 0.0
    downlink: int = 0
    tokens: float = 1.0
    senders: int | None = None


def composed(make: Callable[[TensorManifest], Compressor], budget: int | None = None, noise: int = 0) -> Codec:
    """One of the library's compressors. noise: levels on each side of zero for stochastic rounding before it."""

    def send(delta: Any, at: Sending) -> tuple[bytes, Part, State]:
        manifest, values = at.manifest, delta
        if noise:
            values = _stochastic(delta, manifest, noise, at)
        fisher = manifest.unflatten(at.fisher)
        blob, state = make(manifest).compress(manifest.unflatten(values), fisher, at.state, budget, at.round)
        said = manifest.flatten(decompress(blob, manifest, BASE, at.round))
        return blob, Part(said, None, 1.0), state

    return send


def everything(name: str) -> Callable[[TensorManifest], Compressor]:
    return lambda manifest: Compressor(manifest, BASE, Magnitude(), Everything(name), Forget())


def sparse(density: float, name: str, feedback: bool) -> Callable[[TensorManifest], Compressor]:
    memory = ErrorFeedback() if feedback else Forget()
    return lambda manifest: Compressor(manifest, BASE, Magnitude(), Fixed(density, name), memory)


def preset(name: str) -> Callable[[TensorManifest], Compressor]:
    return lambda manifest: Compressor.preset(name, manifest, BASE)


def tiles(budget: int) -> Codec:
    """The library's mosaic."""

    def send(delta: Any, at: Sending) -> tuple[bytes, Part, State]:
        tile = Tile.within(at.manifest, at.round, at.slot, at.slots, budget)
        blob = mosaic.compress(at.manifest.unflatten(delta), at.manifest, BASE, tile)
        indices, values = mosaic.decompress(blob, at.manifest, BASE, tile)
        return blob, Part(values, indices, 1.0), at.state

    return send


def _stochastic(delta: Any, manifest: TensorManifest, levels: int, at: Sending) -> Any:
    """Unbiased rounding to multiples of max / levels in each tensor, as QSGD does."""
    rng, parts = np.random.default_rng((at.round, at.slot)), []
    for part in np.split(delta, np.cumsum(manifest.sizes)[:-1]):
        step = np.float32(max(float(np.abs(part).max()), 1e-12) / levels)
        parts.append(np.floor(part / step + rng.random(len(part), np.float32)) * step)
    return np.concatenate(parts).astype(np.float32)


SWIFT = Method(tiles(2700), "mosaic, A and B but of queries and keys, averaged weights", "AB-vod", 0.3, 1.5, 4, 16000)
METHODS: dict[str, Method] = {
    "fedavg": Method(composed(preset("lossless")), "LoRA FedAvg, float32"),
    "fedavg-fp16": Method(composed(everything("fp16")), "LoRA FedAvg, float16"),
    "fedavg-momentum": Method(composed(preset("lossless")), "float32 with server momentum (FedAvgM)", "AB", 0.7, 0.5),
    "fedavg-averaged": Method(composed(preset("lossless")), "float32, averaged weights delivered", average=4),
    "ffa": Method(composed(preset("lossless")), "FFA-LoRA (arXiv 2403.12313): B only, float32", "B"),
    "fedpaq": Method(composed(everything("uniform8"), noise=127), "FedPAQ (arXiv 1909.13014): 8 bits, stochastic"),
    "qsgd4": Method(composed(everything("uniform4"), noise=7), "QSGD (arXiv 1610.02132): 4 bits, stochastic"),
    "nf4": Method(composed(everything("nf4")), "4-bit NormalFloat, as NVFlare's quantizer"),
    "flasc": Method(composed(sparse(0.1, "fp16", False)), "FLASC-style (arXiv 2406.05233): top 10 %, float16"),
    "top-k": Method(composed(sparse(0.05, "lloyd2", True)), "top 5 % with error feedback"),
    "top-k-2": Method(composed(sparse(0.02, "lloyd2", True)), "top 2 % with error feedback"),
    "paper": Method(composed(preset("paper")), "Fed-FSTQ's rule (arXiv 2604.25421)"),
    "fstq": Method(composed(preset("fstq"), budget=1400), "Fisher, water-filling, error feedback; 1,400 bytes"),
    "mosaic": Method(tiles(2100), "mosaic, B only, 2,100 bytes, server momentum 0.3", "B", 0.3),
    "mosaic-lean": Method(tiles(2100), "mosaic, B but of queries and keys, 2,100 bytes, momentum 0.6", "B-vod", 0.6),
    "mosaic-swift": SWIFT,
    "mosaic-steady": replace(SWIFT, about="as mosaic-swift, server rate 1 for 9 senders", server=1.0, senders=9),
    "mosaic-tokens": replace(SWIFT, about="as mosaic-swift, loss of half of the tokens", tokens=0.5),
    "paper-tokens": Method(composed(preset("paper")), "Fed-FSTQ's rule, loss of half of the tokens", tokens=0.5),
}  # fmt: skip
