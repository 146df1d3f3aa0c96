"""The trainer on tiny random models: gradients, accumulation, Fisher, PEFT's files; and a whole federation of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the 'federated' extra")
pytest.importorskip("transformers", reason="training needs the 'federated' extra")
pytest.importorskip("peft", reason="training needs the 'federated' extra")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from fstq_infer.errors import OptionError
from fstq_infer.federated.train import IGNORED, Example, LoraTrainer, TrainSettings, identity

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "gpt2": GPT2Config(
        vocab_size=40,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def model(name: str = "llama", dtype: Any = None) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype or torch.float32)


def examples(count: int = 12, client: int = 0) -> list[Example]:
    """Counting upwards from a start; nothing is learnt of the first two tokens."""
    rows = []
    for number in range(count):
        tokens = tuple((number + client + step) % 40 for step in range(6 + number % 5))
        rows.append(Example(tokens, (IGNORED, IGNORED, *tokens[2:])))
    return rows


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learns_and_repeats(name: str, dtype: Any) -> None:
    settings = TrainSettings(steps=12, batch=4, learning_rate=1e-2)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        trainer = LoraTrainer(model(name, dtype), rank=4)
        before = trainer.loss(examples())
        done = trainer.train(examples(), settings, seed=5)
        assert trainer.loss(examples()) < 0.95 * before and done.examples == 12
        results.append(done)
    for key, values in results[0].arrays.items():
        assert values.dtype == np.float32 and np.array_equal(values, results[1].arrays[key])
        assert results[0].fisher[key].shape == values.shape and (results[0].fisher[key] >= 0).all()
    assert max(values.max() for values in results[0].fisher.values()) > 0


def test_only_b_is_trained_and_exchanged() -> None:
    torch.manual_seed(1)
    trainer = LoraTrainer(model(), rank=4, factors="B")
    fixed = {name: weight.clone() for name, weight in trainer.model.named_parameters() if "lora_B" not in name}
    before = trainer.loss(examples())
    done = trainer.train(examples(), TrainSettings(steps=12, batch=4, learning_rate=1e-2), seed=5)
    assert trainer.loss(examples()) < 0.95 * before
    assert done.arrays.keys() == done.fisher.keys() and all(".lora_B." in name for name in done.arrays)
    assert all(torch.equal(weight, fixed[name]) for name, weight in trainer.model.named_parameters() if name in fixed)
    torch.manual_seed(1)
    same = LoraTrainer(model(), rank=4, factors="B")
    same.load(done.arrays)
    assert same.identity == trainer.identity and same.loss(examples()) == trainer.loss(examples())
    torch.manual_seed(2)
    assert LoraTrainer(model(), rank=4, factors="B").identity == trainer.identity  # model() seeds anew
    other = model()
    torch.manual_seed(2)
    drawn = LoraTrainer(other, rank=4, factors="B")
    assert drawn.identity != trainer.identity != LoraTrainer(model(), rank=4).identity


def test_accumulated_steps_equal_whole_ones() -> None:
    """Micro-batches of unequal lengths: the gradient is that of the mean over tokens, not over micro-batches."""
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        trainer = LoraTrainer(model(), rank=4)
        found.append(trainer.train(examples(), TrainSettings(2, batch, accumulate), seed=5))
    for key in found[0].arrays:
        np.testing.assert_allclose(found[0].arrays[key], found[1].arrays[key], atol=2e-5)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)


def test_fisher_is_a_running_mean_of_squared_gradients() -> None:
    """Two steps that move nothing, decay d: (d g1^2 + g2^2) / (1 + d); the gradients taken apart, by torch alone."""
    torch.manual_seed(1)
    trainer, rng = LoraTrainer(model(), rank=4), np.random.default_rng(0)
    trainer.load({name: rng.normal(0, 0.1, values.shape) for name, values in trainer.arrays().items()})
    found = trainer.train(examples(), TrainSettings(2, 6, learning_rate=1e-12, fisher_decay=0.8), seed=5).fisher
    order, squares = np.random.default_rng(5).permutation(12), list[dict[str, np.ndarray]]()
    for half in (order[:6], order[6:]):
        trainer.model.zero_grad()
        rows = [examples()[index] for index in half]
        count = sum(len(row.tokens) - 2 for row in rows)
        for row in rows:
            loss = trainer.model(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([row.labels])).loss
            (loss * (len(row.tokens) - 2) / count).backward()
        squares.append({name: weight.grad.numpy() ** 2 for name, weight in trainer._named()})
    for name, values in found.items():
        expected = (0.8 * squares[0][name] + squares[1][name]) / 1.8
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_weights_go_in_and_out_and_to_peft(tmp_path: Path) -> None:
    trainer = LoraTrainer(model(), rank=4)
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal(values.shape).astype(np.float32) for name, values in trainer.arrays().items()}
    trainer.load(given)
    assert all(np.array_equal(values, given[name]) for name, values in trainer.arrays().items())
    trainer.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    ids = torch.arange(10)[None]
    fresh = PeftModel.from_pretrained(model(), str(tmp_path))
    with torch.no_grad():
        np.testing.assert_allclose(fresh(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)
    for wrong in ({}, {**given, "more": np.zeros(2)}, {**given, next(iter(given)): np.zeros((2, 2))}):
        with pytest.raises(OptionError, match="LoRA settings"):
            trainer.load(wrong)


def test_fedprox_pulls_back() -> None:
    moved = []
    for proximal in (0.0, 100.0):
        torch.manual_seed(1)
        trainer = LoraTrainer(model(), rank=4)
        before = trainer.arrays()
        done = trainer.train(examples(), TrainSettings(8, 4, learning_rate=1e-2, clip=1e9, proximal=proximal), seed=5)
        moved.append(sum(float(np.square(values - before[name]).sum()) for name, values in done.arrays.items()))
    assert moved[1] < 0.5 * moved[0]


def test_identity_is_of_the_weights() -> None:
    first, other = model(), model()
    assert identity(first) == identity(other) == LoraTrainer(model()).identity and len(identity(first)) == 16
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert identity(other) != identity(first)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Example((1, 2), (1,)),
        lambda: Example((1,), (1,)),
        lambda: TrainSettings(steps=0),
        lambda: TrainSettings(fisher_decay=1.0),
        lambda: LoraTrainer(model(dtype=torch.float16)),
        lambda: LoraTrainer(model(), factors="A"),
        lambda: LoraTrainer(model()).train([], TrainSettings()),
    ],
)
def test_bad_settings(make: Any) -> None:
    with pytest.raises(OptionError):
        make()


def test_a_federation_of_adapters(tmp_path: Path) -> None:
    """Four clients that count from different starts: compressed messages bring the loss down for all of them."""
    pytest.importorskip("flwr", reason="a federation needs the 'federated' extra")
    pytest.importorskip("constriction", reason="messages need the 'federated' extra")
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    from fstq_infer.federated.budget import SameBudget
    from fstq_infer.federated.client import client_app
    from fstq_infer.federated.local import LocalGrid
    from fstq_infer.federated.mod import FstqMod
    from fstq_infer.federated.server import Rounds, federate
    from fstq_infer.federated.strategy import FstqStrategy

    torch.manual_seed(1)
    trainer = LoraTrainer(model(), rank=4)
    rows = [examples(12, 10 * client) for client in range(4)]
    app = client_app(lambda _: trainer, lambda context: rows[context.node_config["partition-id"]],
                     TrainSettings(5, 6, learning_rate=1e-2), [FstqMod(trainer.identity, tmp_path)])  # fmt: skip
    grid = LocalGrid(app, 4)
    strategy = FstqStrategy(FedAvg(), trainer.identity, SameBudget(2000))
    start = ArrayRecord({name: Array(values) for name, values in trainer.arrays().items()})
    result = federate(strategy, grid, start, Rounds(4))
    losses = [metrics["loss"] for metrics in result.evaluate_metrics_clientapp.values()]
    assert losses[-1] < 0.9 * losses[0] and strategy.refused.total() == 0
    dense = 4 * sum(values.size for values in trainer.arrays().values())
    assert all(metrics["fstq-bytes"] <= 4 * 2000 < 4 * dense for metrics in result.train_metrics_clientapp.values())
