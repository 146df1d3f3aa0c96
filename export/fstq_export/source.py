"""Where a model comes from: a local Hugging Face folder or a hub id, safetensors only. Knows configs, not graphs."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fstq_infer.atomic import sha256_file
from fstq_infer.bundle import GenerationDefaults
from fstq_infer.errors import ExportError, UnsupportedModelError

OTHERS = {
    "manifest.json": ": it is a bundle already, for 'fstq build' and 'fstq run'",
    "adapter_config.json": ": it is a LoRA adapter, for --adapter or --merge-adapter beside its base model",
}
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_log = logging.getLogger(__name__)
ATTENTION_TYPES = ("full_attention", "sliding_attention")
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Source:
    """A resolved model: its folder, the name the user gave, its configuration and content hash."""

    name: str
    folder: Path
    config: Any
    sha256: str

    @property
    def architecture(self) -> str:
        """The Transformers class name."""
        return str((self.config.architectures or [self.config.model_type])[0])

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer the sliding attention window in tokens, None for full attention."""
        return layer_windows(self.config)


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Sliding windows by layer; raises UnsupportedModelError for attention that masks by position cannot express."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if kinds := getattr(config, "attention_layers", None):  # GPT-Neo has its own words
        window = config.window_size
        types = ["sliding_attention" if kind == "local" else "full_attention" for kind in kinds]
    window = window or None  # 0 where the configuration says not to use it
    if window is not None and (not isinstance(window, int) or window < 1):
        raise UnsupportedModelError(
            f"{config.model_type}: the sliding window is {window!r}; expected a number of tokens above 0"
        )
    if not types:
        return (window,) * layers
    odd = sorted({str(t) for t in types} - set(ATTENTION_TYPES))
    if odd:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of type {', '.join(odd)} are not supported; found layer types "
            f"{sorted(set(types))}, supported are {', '.join(ATTENTION_TYPES)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def check_sizes(config: Any, name: str) -> None:
    """Raises UnsupportedModelError for what is no decoder with attention and positions in every layer."""
    if getattr(config, "is_decoder", None) is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{name}: this '{config.model_type}' model is an encoder (is_decoder is false); "
            "only decoder-only causal LMs are supported"
        )
    for size in SIZES:
        value = getattr(config, size, None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(
                f"{name}: {size} of this '{config.model_type}' model is {value!r}, expected a number above 0; "
                "only decoders with attention in every layer and rotary or learned positions are supported"
            )


def within_first_rope(config: Any) -> None:
    """Shorten the context of a LongRoPE model in place to the length up to which its short factors hold.

    Beyond it Transformers switches all positions, cached ones too, to other tables; one graph cannot do that.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if parameters.get("rope_type") != "longrope":
            continue
        first, whole = int(parameters["original_max_position_embeddings"]), config.max_position_embeddings
        if first < whole:
            parameters.setdefault("factor", whole / first)  # it scales attention; otherwise taken from the lengths
            config.max_position_embeddings = first
            name = config.model_type
            _log.warning("%s: context cut from %d to %d tokens, where its LongRoPE changes", name, whole, first)


def resolve(model: str, revision: str | None = None) -> Source:
    """A local folder, or a hub id that is downloaded. Raises ExportError or UnsupportedModelError by name."""
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model, revision)
    if not (folder / "config.json").is_file():
        found = next((what for name, what in OTHERS.items() if (folder / name).is_file()), "")
        raise ExportError(f"{folder} holds no config.json{found}; expected a Hugging Face model folder or a hub id")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ExportError(
            f"{folder} holds no *.safetensors weights; other formats can run code when read and are refused. "
            "Convert the checkpoint first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # validators of many kinds, and attribute and type errors where it is no object
        raise UnsupportedModelError(f"{model}: Transformers cannot read its configuration ({error})") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{model}: model type '{config.model_type}' is no decoder-only causal LM; nothing was exported"
        )
    config = config.get_text_config(decoder=True)
    check_sizes(config, model)
    layer_windows(config)  # raises, before minutes of calibration
    within_first_rope(config)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        digest.update(bytes.fromhex(sha256_file(path)))
    return Source(model, folder, config, digest.hexdigest())


def _download(model: str, revision: str | None) -> Path:
    if Path(model).is_file() or model.startswith((".", "~", os.sep)) or model.count("/") > 1:
        found = "is a file" if Path(model).is_file() else "does not exist"
        raise ExportError(f"'{model}' {found}; expected a Hugging Face model folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ExportError(
            f"'{model}' is neither a folder here nor a model that could be downloaded from the hub ({_brief(error)})"
        ) from error


def _brief(error: Exception) -> str:
    """The first line of an error whose text has several, and what to do where there is no network."""
    line = str(error).strip().partition("\n")[0].removeprefix("(")
    offline = "; without a network give a folder" if isinstance(error, LocalEntryNotFoundError) else ""
    return f"{line}{offline}"


def tokenizer(source: Source) -> Any:
    """The fast tokenizer; raises ExportError where the model has only a slow one or none."""
    try:
        loaded = AutoTokenizer.from_pretrained(source.folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # ValueError and OSError where there is none, anything where its files are broken
        raise ExportError(
            f"{source.name}: no tokenizer could be loaded ({error}); put tokenizer.json beside the weights"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ExportError(f"{source.name}: only a slow tokenizer was found; a tokenizer.json is needed on the device")
    return loaded


def generation_defaults(source: Source) -> GenerationDefaults:
    """Sampling defaults from generation_config.json, greedy where it does not sample; raises ExportError if broken."""
    try:
        given = (source.folder / "generation_config.json").is_file()
        config = GenerationConfig.from_pretrained(source.folder) if given else GenerationConfig()
        return _defaults(source.config, config)
    except Exception as error:  # JSON, file system and type errors, and Transformers' own
        raise ExportError(
            f"{source.name}: generation_config.json cannot be read ({error}); mend it or take it away"
        ) from error


def _ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """One id, several or none; those outside the vocabulary (-1 stands for none in some checkpoints) are left out."""
    found = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    return tuple(int(i) for i in found if 0 <= int(i) < vocab_size)


def _defaults(model: Any, config: Any) -> GenerationDefaults:
    bos = config.bos_token_id if config.bos_token_id is not None else getattr(model, "bos_token_id", None)
    eos = config.eos_token_id if config.eos_token_id is not None else getattr(model, "eos_token_id", None)
    begins, ends = _ids(bos, model.vocab_size), _ids(eos, model.vocab_size)

    def setting(name: str, otherwise: float, low: float) -> float:
        """``otherwise`` is what Transformers takes where nothing is said."""
        value = getattr(config, name)
        number = otherwise if value is None else float(value)
        if not low <= number < float("inf"):
            raise ValueError(f"{name} is {value}")
        return number

    sample = bool(config.do_sample)
    return GenerationDefaults(
        bos_token_id=begins[0] if begins else None,
        eos_token_ids=ends,
        temperature=setting("temperature", 1.0, 0.0) if sample else 0.0,
        top_k=int(setting("top_k", 50, 0)) if sample else 0,
        top_p=min(1.0, setting("top_p", 1.0, 1e-9)) if sample else 1.0,
        repetition_penalty=setting("repetition_penalty", 1.0, 1e-9),
    )
