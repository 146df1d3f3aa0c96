"""Where a model comes from: a local Hugging Face folder or a hub id, safetensors only. Knows configs, not graphs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fstq_infer.atomic import sha256_file
from fstq_infer.bundle import GenerationDefaults
from fstq_infer.errors import ExportError, UnsupportedModelError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
ATTENTION_TYPES = ("full_attention", "sliding_attention")


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
    """Sliding windows by layer; raises UnsupportedModelError for attention patterns that masks by position cannot express."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return (window,) * layers
    odd = sorted({str(t) for t in types} - set(ATTENTION_TYPES))
    if odd:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of type {', '.join(odd)} are not supported; found layer types {sorted(set(types))}, "
            f"supported are {', '.join(ATTENTION_TYPES)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def resolve(model: str, revision: str | None = None) -> Source:
    """A local folder, or a hub id that is downloaded. Raises ExportError or UnsupportedModelError by name."""
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model, revision)
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} holds no config.json; expected a Hugging Face model folder or a hub id")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ExportError(
            f"{folder} holds no *.safetensors weights; other formats can run code when read and are refused. "
            "Convert the checkpoint first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(f"{model}: Transformers cannot read its configuration ({error})") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{model}: model type '{config.model_type}' is no decoder-only causal LM; nothing was exported"
        )
    config = config.get_text_config(decoder=True)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        digest.update(bytes.fromhex(sha256_file(path)))
    return Source(model, folder, config, digest.hexdigest())


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ExportError(
            f"'{model}' is neither a folder here nor a model that could be downloaded from the hub ({error})"
        ) from error


def tokenizer(source: Source) -> Any:
    """The fast tokenizer; raises ExportError where the model has only a slow one or none."""
    try:
        loaded = AutoTokenizer.from_pretrained(source.folder, use_fast=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ExportError(
            f"{source.name}: no tokenizer could be loaded ({error}); put tokenizer.json beside the weights"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ExportError(f"{source.name}: only a slow tokenizer was found; a tokenizer.json is needed on the device")
    return loaded


def generation_defaults(source: Source) -> GenerationDefaults:
    """Sampling defaults from generation_config.json; greedy where it says nothing."""
    try:
        config = GenerationConfig.from_pretrained(source.folder)
    except (OSError, json.JSONDecodeError):
        config = GenerationConfig()
    ids = config.eos_token_id if config.eos_token_id is not None else source.config.eos_token_id
    eos = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    sample = bool(config.do_sample)
    return GenerationDefaults(
        bos_token_id=source.config.bos_token_id,
        eos_token_ids=tuple(int(i) for i in eos),
        temperature=float(config.temperature if sample and config.temperature is not None else 0.0),
        top_k=int(config.top_k if sample and config.top_k else 0),
        top_p=float(config.top_p if sample and config.top_p else 1.0),
        repetition_penalty=float(config.repetition_penalty or 1.0),
    )
