"""What several test files share: a tiny real bundle, made by the exporter's own passes from random weights."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fstq_infer.adapters.ports import LoraPorts
from fstq_infer.bundle import (
    Bundle,
    BundleWriter,
    GenerationDefaults,
    Manifest,
    ModelInfo,
    Provenance,
    Pruning,
)
from fstq_infer.runtime.engine import Stage

# In the background of a shell, Ctrl-C is ignored, and so it would be by the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXTRAS = ("torch", "transformers", "mobius", "onnx_ir", "tokenizers", "onnxruntime")
STAGES = (Stage(1, 1, 4), Stage(3, 2, 3))
VOCABULARY, LAYERS, WIDTH, HEADS, POSITIONS = 96, 4, 32, 4, 160


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tests of tiny models use one thread: several only wait for each other there."""
    torch = sys.modules.get("torch")  # not imported for this: many tests need none
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(before)


def write_bundle(
    out: Path, graph: Path, stages: tuple[Stage, ...] = STAGES, lora: LoraPorts | None = None, **model: Any
) -> Bundle:
    """A bundle around model.onnx and model.onnx.data in ``graph``; ``model`` overrides fields of its description."""
    described: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "layers": LAYERS,
        "hidden_size": WIDTH,
        "vocab_size": VOCABULARY,
        "max_positions": POSITIONS,
        "parameters": 40_000,
        "dtype": "float32",
    }
    manifest = Manifest(
        model=ModelInfo(**(described | model)),
        stages=stages,
        pruning=Pruning(0.5, "gate", False, None, None),
        generation=GenerationDefaults(1, (2,), 0.0, 0, 1.0, 1.0),
        provenance=Provenance("tiny", "0" * 64, {}, 0, "2026-01-01", "tests"),
        lora=lora,
    )
    with BundleWriter(out) as writer:
        for name in ("model.onnx", "model.onnx.data"):
            if (graph / name).exists():
                shutil.copy(graph / name, writer.path / name)
        (writer.path / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
        (writer.path / "report.json").write_text("{}", encoding="utf-8")
        return writer.commit(manifest)


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the graph of a random Llama of 4 layers with two pruning stages."""
    for name in EXTRAS:
        pytest.importorskip(name, reason="the tiny bundle needs the 'export' extra")
    import torch
    from fstq_export import decoder, source
    from fstq_export.passes.pruning import PruneStage
    from transformers import LlamaConfig, LlamaForCausalLM

    from fstq_infer.fisher.probe import Probe

    folder = tmp_path_factory.mktemp("tiny-graph")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,  # large enough for attention and logits to depend on the tokens
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    stages = [PruneStage(stage, Probe(WIDTH, HEADS).arrays()) for stage in STAGES]
    decoder.save(decoder.build_graph(source.resolve(str(folder / "hf")), "float32", stages), folder)
    return folder


@pytest.fixture(scope="module")
def tiny_bundle(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with two pruning stages, to be read only."""
    return write_bundle(tmp_path_factory.mktemp("tiny") / "tiny.bundle", tiny_graph)


@pytest.fixture
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for engines, in place of the user's."""
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def _tokenizer() -> str:
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0} | {f"t{number}": number for number in range(1, VOCABULARY)}
    text: str = Tokenizer(models.WordLevel(words, unk_token="<unk>")).to_str()
    return text
