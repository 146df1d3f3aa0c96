"""Where models come from: folders and configurations that are refused, tokenizers, generation defaults. No network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")

import torch
from fstq_export import reference, source
from transformers import LlamaConfig, MistralConfig

from fstq_infer.bundle import GenerationDefaults
from fstq_infer.errors import ExportError, UnsupportedModelError

from . import families


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def change(folder: Path, **values: Any) -> str:
    """Change config.json; returns the folder's name."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_good_folder(folder: Path) -> None:
    found = source.resolve(str(folder))
    assert (found.name, found.folder, found.architecture) == (str(folder), folder, "LlamaForCausalLM")
    assert found.layers == families.LAYERS and found.windows == (None,) * 4
    assert len(found.sha256) == 64 and found.sha256 == source.resolve(str(folder)).sha256


def test_the_hash_covers_configuration_and_weights(folder: Path) -> None:
    first = source.resolve(str(folder)).sha256
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    second = source.resolve(str(folder)).sha256
    third = source.resolve(change(folder, rms_norm_eps=1e-4)).sha256
    assert len({first, second, third}) == 3


def test_a_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"no/such/model' does not exist"):
        source.resolve(str(tmp_path / "no" / "such" / "model"))  # no hub id, so the hub is not asked

    def offline(*_args: Any, **_options: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ExportError, match=r"'org/name' is neither .*no route to host"):
        source.resolve("org/name")


def test_a_hub_model_is_downloaded_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(part in pattern for pattern in allow_patterns for part in ("bin", "pt", "py"))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = source.resolve("org/name", "v2")
    assert asked == [("org/name", "v2")] and (found.name, found.folder) == ("org/name", folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds no config\.json"):
        source.resolve(str(tmp_path))


def test_pickled_weights_are_refused_with_advice(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"no \*\.safetensors .*can run code.*save_pretrained"):
        source.resolve(str(folder))


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"llama"', "\u2603"])
def test_a_broken_configuration(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="cannot read its configuration"):
        source.resolve(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "zork"}, "zork"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"layer_types": ["full_attention", "zork", "zork", "zork"]}, "zork"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of this 'llama' model is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers of this 'llama' model is -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings of this 'llama' model is 0"),
        ({"model_type": "t5"}, "'t5' is no decoder-only causal LM"),
        ({"sliding_window": "wide"}, "sliding window is 'wide'"),
        ({"sliding_window": -3}, "sliding window is -3"),
    ],
)
def test_configurations_that_are_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        source.resolve(change(folder, **values))


def test_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    name = change(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert source.resolve(name).architecture == "LlamaForCausalLM"


def test_an_encoder_is_refused_unless_it_decodes(tmp_path: Path) -> None:
    for decodes in (False, True):
        families.config_of("bert", is_decoder=decodes).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        if decodes:
            assert source.resolve(str(tmp_path)).layers == families.LAYERS
        else:
            with pytest.raises(UnsupportedModelError, match="is an encoder"):
                source.resolve(str(tmp_path))


def test_windows_by_layer() -> None:
    mixed = ["sliding_attention", "full_attention"]
    assert source.layer_windows(MistralConfig(num_hidden_layers=2, sliding_window=5)) == (5, 5)
    assert source.layer_windows(MistralConfig(num_hidden_layers=2, sliding_window=None)) == (None, None)
    assert source.layer_windows(LlamaConfig(num_hidden_layers=2)) == (None, None)
    assert source.layer_windows(families.config_of("gemma3")) == (32, None, 32, None)
    assert source.layer_windows(families.config_of("gpt_neo")) == (None, 100, None, 100)
    assert source.layer_windows(families.config_of("qwen2_mixed")) == (None, None, 32, 32)
    assert source.layer_windows(families.config_of("qwen2_moe")) == (None,) * 4  # says 0: not used
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types, config.sliding_window = mixed, 7
    assert source.layer_windows(config) == (7, None)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModelError, match=r"llama: layers of type chunked_attention .* supported are full"):
        source.layer_windows(config)


def test_longrope_is_cut_to_its_first_length() -> None:
    config = families.config_of("phi3_longrope")
    module = reference.rotary_module(config)
    assert module is not None
    before = module(torch.zeros(1, 100, 1), torch.arange(100)[None])
    source.within_first_rope(config)
    assert config.max_position_embeddings == 100
    cut = reference.rotary_module(config)
    assert cut is not None
    after = cut(torch.zeros(1, 100, 1), torch.arange(100)[None])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # the attention factor included
    assert float(after[0].max()) > 1.05
    again = config.to_dict()
    source.within_first_rope(config)
    assert config.to_dict() == again


def test_other_ropes_are_not_cut() -> None:
    for name in ("llama", "llama_yarn", "gemma3"):
        config = families.config_of(name)
        source.within_first_rope(config)
        assert config.max_position_embeddings == families.POSITIONS


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_fast_tokenizer(folder: Path) -> None:
    loaded = source.tokenizer(source.resolve(str(folder)))
    assert loaded.decode(loaded.encode("a snowman \u2603")) == "a snowman \u2603"


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_no_tokenizer(folder: Path, text: str | None) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ExportError, match=r"(?s)no tokenizer could be loaded .*put tokenizer\.json beside the weights"):
        source.tokenizer(source.resolve(str(folder)))


def test_a_slow_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    (folder / "vocab.json").write_text('{"a": 0, "<unk>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n\n")
    with pytest.raises(ExportError, match="only a slow tokenizer was found"):
        source.tokenizer(source.resolve(str(folder)))


# --- generation defaults ---------------------------------------------------------------------------------------------

GREEDY = GenerationDefaults(1, (2,), 0.0, 0, 1.0, 1.0)


def defaults(folder: Path, content: Any) -> GenerationDefaults:
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return source.generation_defaults(source.resolve(str(folder)))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, GREEDY),
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 0.7, "top_k": 9}, GREEDY),
        ({"do_sample": True}, GenerationDefaults(1, (2,), 1.0, 50, 1.0, 1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
            GenerationDefaults(1, (2,), 0.6, 20, 0.9, 1.1),
        ),
        ({"do_sample": True, "top_k": 0, "temperature": 1.5}, GenerationDefaults(1, (2,), 1.5, 0, 1.0, 1.0)),
        ({"repetition_penalty": 1.3}, GenerationDefaults(1, (2,), 0.0, 0, 1.0, 1.3)),
        ({"bos_token_id": 5, "eos_token_id": [7, 8]}, GenerationDefaults(5, (7, 8), 0.0, 0, 1.0, 1.0)),
        ({"eos_token_id": 9}, GenerationDefaults(1, (9,), 0.0, 0, 1.0, 1.0)),
        ({"eos_token_id": [9, 512, -1]}, GenerationDefaults(1, (9,), 0.0, 0, 1.0, 1.0)),
    ],
)
def test_generation_defaults(folder: Path, content: Any, wanted: GenerationDefaults) -> None:
    assert defaults(folder, content) == wanted


def test_ids_outside_the_vocabulary_mean_none(folder: Path) -> None:
    change(folder, bos_token_id=None, eos_token_id=50256)
    assert defaults(folder, None) == GenerationDefaults(None, (), 0.0, 0, 1.0, 1.0)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "top_p": 0},
        {"repetition_penalty": 0},
        {"eos_token_id": [[1]]},
    ],
)
def test_broken_generation_defaults(folder: Path, content: Any) -> None:
    with pytest.raises(ExportError, match=r"generation_config\.json cannot be read"):
        defaults(folder, content)
