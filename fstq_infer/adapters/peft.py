"""Reads a LoRA adapter in PEFT's format, adapter_config.json and adapter_model.safetensors, and trusts nothing in it.

Needs neither PEFT nor torch. What is not plain LoRA is refused by name: a wrong answer would not be noticed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fstq_infer.adapters import pattern, tensors
from fstq_infer.adapters.ports import MOST_RANK
from fstq_infer.errors import AdapterFormatError, AdapterKindError, AdapterMismatchError, suggestion
from fstq_infer.strict_json import show

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_CAP = 1 << 20
OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
BASE_HASH = "fstq_base_sha256"  # our own, optional: provenance.source_sha256 of the model that it was trained on
PREFIX = "base_model.model."
MERGE = "Merge it into the model with PEFT (merge_and_unload), save that, and export it"
RETRAIN = "train a plain LoRA adapter"
# option -> (what it is called, what to do); refused unless false, null or empty
REFUSED = {
    "use_dora": ("DoRA", MERGE),
    "use_qalora": ("QALoRA", MERGE),
    "use_bdlora": ("BD-LoRA", MERGE),
    "lora_bias": ("LoRA with a bias (lora_bias)", MERGE),
    "modules_to_save": ("with modules trained as a whole (modules_to_save)", MERGE),
    "trainable_token_indices": ("with trained token embeddings (trainable_token_indices)", MERGE),
    "target_parameters": ("of parameters instead of modules (target_parameters)", MERGE),
    "layer_replication": ("with replicated layers (layer_replication)", MERGE),
    "alora_invocation_tokens": ("aLoRA, active from invocation tokens on", f"No merge is possible; {RETRAIN}"),
    "arrow_config": ("Arrow, a router over adapters", f"No merge is possible; {RETRAIN}"),
    "kasa_config": ("KaSA", MERGE),
    "velora_config": ("VeLoRA", MERGE),
    "monteclora_config": ("MonteCLoRA", MERGE),
    "megatron_config": ("of a Megatron model", MERGE),
}
# Initialisations that change the base weights too: the adapter fits the changed ones only.
MOST_TRIES = 1 << 19  # patterns times modules: every module of 100 layers may have a pattern of its own
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "mica")
_KEY = re.compile(r"(?P<module>[\w.\-]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight", re.ASCII)
_KNOWN_KEYS = {
    "lora_magnitude_vector": "use_dora",
    "lora_bias": "lora_bias",
    ".lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "original_module": "modules_to_save",
    "token_adapter": "trainable_token_indices",
}
Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Config:
    """Checked adapter_config.json. base: the model's name as the trainer knew it; base_sha256: of our exports."""

    rank: int
    alpha: float
    root: bool  # rank-stabilised: alpha over the root of the rank
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    layers: frozenset[int] | None
    targets: tuple[str, ...] | None  # None: a pattern that the weights stand for
    excluded: tuple[str, ...] | None  # as targets
    base: str
    base_sha256: str | None

    def scale(self, module: str) -> float:
        """What a module's product is multiplied with."""
        rank = self.rank_of(module)
        return pattern.find(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.root else rank)

    def rank_of(self, module: str) -> int:
        """Rank that the configuration gives a module."""
        return pattern.find(self.ranks, module, self.rank)


@dataclass(frozen=True, slots=True)
class Pair:
    """A (rank, inputs) and B (outputs, rank) of a module; the product B A is scaled by ``scale``."""

    a: Matrix
    b: Matrix
    scale: float


@dataclass(frozen=True, slots=True)
class Peft:
    """An adapter as PEFT saved it. pairs: by the model's module."""

    path: Path
    config: Config
    pairs: Mapping[str, Pair]

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(len(pair.a) for pair in self.pairs.values())


def read(directory: Path) -> Peft:
    """Read and check an adapter's folder.

    Raises AdapterFormatError for absent or damaged files, AdapterKindError for what is no plain LoRA,
    AdapterMismatchError where configuration and weights contradict each other.
    """
    if not directory.is_dir():
        raise AdapterFormatError(f"{str(directory)!a} is no folder; expected one with {CONFIG} and {WEIGHTS}.")
    config = parse(directory / CONFIG, _json(directory / CONFIG))
    path = directory / WEIGHTS
    if not path.exists() and (other := next((n for n in OTHER_WEIGHTS if (directory / n).exists()), None)):
        raise AdapterFormatError(
            f"{directory} holds {other}, which can run code when it is read; expected {WEIGHTS}. Save the adapter "
            "again with PEFT's save_pretrained(..., safe_serialization=True)."
        )
    return Peft(directory, config, _pairs(path, tensors.read(path), config))


def _json(path: Path) -> dict[str, Any]:
    tensors.regular_size(path, CONFIG_CAP)
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(CONFIG_CAP).decode("utf-8"), parse_int=lambda text: int(text[:20]))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is no JSON: {error!s:.200}. Save the adapter again.") from error
    if not isinstance(data, dict):
        raise AdapterFormatError(f"{path} holds {show(data)}, expected an object. Save the adapter again.")
    return data


def parse(path: Path, data: Mapping[str, Any]) -> Config:
    """The checked configuration; ``path`` is for messages."""

    def refuse(kind: str, advice: str) -> AdapterKindError:
        return AdapterKindError(f"{path}: the adapter is {kind}, which is not supported. {advice}.")

    kind = data.get("peft_type")
    if kind != "LORA":
        named = f"of the kind {show(kind)}; expected LORA" if kind is not None else "of no kind (peft_type is missing)"
        raise refuse(named, f"{MERGE}, or {RETRAIN}")
    if data.get("task_type") not in (None, "CAUSAL_LM"):
        raise refuse(f"for the task {show(data['task_type'])}; expected CAUSAL_LM", f"To go on, {RETRAIN}")
    for option, (name, advice) in REFUSED.items():
        if data.get(option):
            raise refuse(name, advice)
    if data.get("bias", "none") != "none":
        raise refuse(f"trained with biases (bias is {show(data['bias'])})", MERGE)
    begun = data.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGED_BASE):
        raise refuse(
            f"begun with {begun[:40]!a}, which changes the base weights too",
            "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )

    def wrong(key: str, expected: str) -> AdapterFormatError:
        return AdapterFormatError(f"{path}: {key} is {show(data.get(key))}, expected {expected}. Save it again.")

    def natural(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANK

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < 1e6

    def patterns(key: str, fits: Any, expected: str) -> dict[str, Any]:
        found = data.get(key) or {}
        if not isinstance(found, dict) or not all(fits(value) for value in found.values()):
            raise wrong(key, f"an object of {expected}")
        pattern.check(found, f"{path}: {key}")
        return found

    def modules(key: str) -> tuple[str, ...] | None:
        found = data.get(key)
        if found is None or isinstance(found, str):
            return None
        if not isinstance(found, list) or not all(isinstance(t, str) and len(t) < 512 for t in found):
            raise wrong(key, "a list of names, or a pattern")
        return tuple(found)

    if not natural(data.get("r")):
        raise wrong("r", f"a rank from 1 to {MOST_RANK}")
    if not number(data.get("lora_alpha", 8)):
        raise wrong("lora_alpha", "a number that is not 0")
    layers = data.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(isinstance(n, int) for n in layers)):
        raise wrong("layers_to_transform", "a list of layers")
    base, digest = data.get("base_model_name_or_path"), data.get(BASE_HASH)
    if digest is not None and (not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest)):
        raise wrong(BASE_HASH, "64 hexadecimal digits")
    return Config(
        rank=data["r"],
        alpha=float(data.get("lora_alpha", 8)),
        root=bool(data.get("use_rslora")),
        ranks=patterns("rank_pattern", natural, "ranks"),
        alphas=patterns("alpha_pattern", number, "numbers that are not 0"),
        layers=None if layers is None else frozenset(layers),
        targets=modules("target_modules"),
        excluded=modules("exclude_modules") if data.get("exclude_modules") else (),
        base=base[:512] if isinstance(base, str) else "",
        base_sha256=digest,
    )


def _pairs(path: Path, found: Mapping[str, tensors.Tensor], config: Config) -> dict[str, Pair]:
    """Both matrices of every module in the file."""
    sides: dict[str, dict[str, tensors.Tensor]] = {}
    for key, tensor in found.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise _odd_key(path, key)
        if len(match["module"]) > pattern.LONGEST_NAME:
            raise AdapterFormatError(
                f"{path}: the module {match['module'][:80]!a}... has a name of {len(match['module'])} characters, "
                f"expected at most {pattern.LONGEST_NAME}. Is it a LoRA adapter?"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if (patterns := max(len(config.ranks), len(config.alphas))) * len(sides) > MOST_TRIES:
        raise AdapterKindError(
            f"{path}: {patterns} patterns for {len(sides)} modules take too long to try, expected at most "
            f"{MOST_TRIES // len(sides)}. Write fewer, wider patterns."
        )
    if not sides:
        raise AdapterFormatError(f"{path} holds no lora_A and lora_B. Save the adapter again.")
    pairs = {}
    for module, pair in sides.items():
        if len(pair) != 2:
            raise AdapterFormatError(f"{path}: {module} has only lora_{next(iter(pair))}. Save the adapter again.")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise AdapterFormatError(
                f"{path}: lora_A {a.shape} and lora_B {b.shape} of {module} do not fit; expected (rank, inputs) and "
                "(outputs, rank). Adapters of convolutions are not supported."
            )
        if a.shape[0] != (wanted := config.rank_of(module)):
            raise AdapterMismatchError(
                f"{path}: {module} has rank {a.shape[0]}, but {CONFIG} says {wanted}. Save both again together."
            )
        pairs[module] = Pair(_finite(path, module, a), _finite(path, module, b), config.scale(module))
    return pairs


def _odd_key(path: Path, key: str) -> Exception:
    shown = key[:120].encode("unicode_escape").decode()
    for part, option in _KNOWN_KEYS.items():
        if part in key:
            name, advice = REFUSED[option]
            return AdapterKindError(f"{path} holds {shown}: the adapter is {name}. That is not supported. {advice}.")
    if "lora_embedding" in key:
        return AdapterKindError(f"{path} holds {shown}: adapters of embeddings are not supported. {MERGE}.")
    return AdapterFormatError(
        f"{path} holds {shown}, expected only MODULE.lora_A.weight and MODULE.lora_B.weight. Is it a LoRA adapter?"
    )


def _finite(path: Path, module: str, tensor: tensors.Tensor) -> Matrix:
    array = tensor.array().astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise AdapterFormatError(f"{path}: {module} has weights that are no finite numbers. Train the adapter again.")
    return array


def check_targets(adapter: Peft, modules: Mapping[str, tuple[int, int]], layer_of: Mapping[str, int]) -> None:
    """Raise AdapterMismatchError unless the adapter fits a model.

    modules: (inputs, outputs) of each linear module that can be adapted. layer_of: their decoder layers. Compared are
    names and shapes, what the configuration targets with what the file holds; the weights under it nobody can compare.
    """
    path, config = adapter.path, adapter.config
    base = f" ({config.base[:80]!a})" if config.base else ""
    for module, pair in adapter.pairs.items():
        if module not in modules:
            close = suggestion(module, modules, "it has")
            raise AdapterMismatchError(
                f"{path} adapts {module}, which is no linear layer of a decoder layer in this model; {close}. Was it "
                f"trained on another model{base}? Embeddings and the head "
                "cannot be adapted at run time."
            )
        have = pair.a.shape[1], pair.b.shape[0]
        if have != modules[module]:
            raise AdapterMismatchError(
                f"{path}: {module} has {have[0]} inputs and {have[1]} outputs, but {modules[module][0]} and "
                f"{modules[module][1]} in this model. It was trained on another one{base}."
            )
    wanted = {
        module
        for module in modules
        if (config.targets is None or _is_target(config.targets, module))
        and not (config.excluded and _is_named(config.excluded, module))
        and (config.layers is None or layer_of[module] in config.layers)
    }
    odd = sorted(adapter.pairs.keys() - wanted)
    absent = (
        sorted(wanted - adapter.pairs.keys())
        if config.targets is not None and config.excluded is not None and "all-linear" not in config.targets
        else []
    )
    if odd or absent:
        what = (
            f"holds {odd[0]}, which {CONFIG} does not target" if odd else f"lacks {absent[0]}, which {CONFIG} targets"
        )
        raise AdapterMismatchError(
            f"{path} {what} ({len(odd) + len(absent)} modules differ). Save both again together."
        )


def _is_target(targets: tuple[str, ...], module: str) -> bool:
    return _is_named(targets, module) or targets == ("all-linear",)


def _is_named(names: tuple[str, ...], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
