"""fstq_export.sensitivity and precision: damage by hand, predictions against measured divergence, plans and rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")

import torch
from fstq_export import precision, reference, sensitivity, source
from fstq_export.precision import Planner, Precision
from fstq_export.sensitivity import Collector, Damage, Samples, Site, Weight
from torch import nn

from fstq_infer.errors import OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.quant.codes import Quantized
from fstq_infer.quant.formats import FORMATS

from . import families

QKV = "model.layers.0.self_attn.q_proj+k_proj+v_proj"


def items(count: int, seed: int = 0) -> list[Item]:
    return [Item(tuple(families.ids(30, seed + i)), tuple(families.ids(4, seed + i + 500))) for i in range(count)]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tied model of small weights, whose quantization errors are small beside its logits."""
    folder = families.make("qwen2", tmp_path_factory.mktemp("qwen2"), scale=0.5)
    with reference.reference(source.resolve(str(folder)), stream=False) as decoder:
        yield decoder


def run(frozen: Decoder, wanted: Precision, fitting: int = 24) -> precision.Result:
    return Planner(frozen, wanted, "float32", 0, lambda *_: None).run(items(fitting), items(8, 100))


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)
    return layer


def test_damage_by_hand() -> None:
    """One token x = (1, 2), gradient (3, 0.5); codes are off by 0.1 in W[0][1] and by -0.2 in W[1][0]."""
    site = Site("l", linear([[1.0, 1.0], [1.0, 1.0]]), False)
    samples = {"l": Samples(np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 0.5]], np.float32))}
    damage = Damage(Weight("l", (site,)), samples)
    off = Quantized(FORMATS["fp32"], np.array([[1.0, 1.1], [0.8, 1.0]], np.float32))
    assert damage.of(off) == pytest.approx(0.5 * ((3 * 0.2) ** 2 + (0.5 * -0.2) ** 2), rel=1e-4)
    fisher, moments = damage.importance()
    np.testing.assert_allclose(fisher, [[9.0, 36.0], [0.25, 1.0]])
    np.testing.assert_allclose(moments, 9.25 * np.array([[1, 2], [2, 4]]))
    assert damage.trace() == pytest.approx(46.25)


def test_damage_of_a_lookup_and_a_head_that_share_a_table() -> None:
    table = nn.Embedding(3, 2)
    table.weight = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    head = linear([[1.0, 1.0]] * 3)
    weight = Weight("e", (Site("e", table, True, 2.0), Site("h", head, False)))
    samples = {
        "e": Samples(np.array([1, 1]), np.array([[1.0, 0.0], [2.0, 1.0]], np.float32)),
        "h": Samples(np.array([[1.0, -1.0]], np.float32), np.array([[0.0, 2.0, 1.0]], np.float32)),
    }
    off = np.ones((3, 2), np.float32)
    off[1] += (0.1, 0.3)
    looked_up = ((0.2 * 1) ** 2 + (0.2 * 2) ** 2 + (0.6 * 1) ** 2) / 2  # twice the error, mean of two tokens
    read = (2.0 * (0.1 - 0.3)) ** 2
    found = Damage(weight, samples).of(Quantized(FORMATS["fp32"], off))
    assert found == pytest.approx(0.5 * (looked_up + read), rel=1e-4)


def test_activations_of_dynamic_int8_cost_more(frozen: Decoder, tmp_path: Path) -> None:
    collector = Collector(frozen, tmp_path, 0)
    samples = collector.run(items(8), lambda _: None)
    damage = Damage(collector.weights["model.layers.0.mlp.down_proj"], samples)
    assert damage.quantized(FORMATS["int8-dynamic"])[1] > damage.quantized(FORMATS["int8"])[1]


def test_collected_samples_and_groups(frozen: Decoder, tmp_path: Path) -> None:
    collector = Collector(frozen, tmp_path, 0)
    seen: list[int] = []
    samples = collector.run(items(8), seen.append)
    assert seen[-1] == 8
    assert set(collector.weights) == {name for names in collector.groups.values() for name in names}
    assert collector.groups[QKV] == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert collector.groups["model.layers.3.mlp.gate_proj+up_proj"]
    assert len(collector.groups) == 1 + 4 * families.LAYERS
    q, k = (samples[f"model.layers.0.self_attn.{x}_proj"] for x in "qk")
    np.testing.assert_array_equal(q.inputs, k.inputs)
    assert (np.abs(q.gradients).sum(1) > 0).mean() > 0.9 and q.gradients.shape[1] == 64
    assert samples["model.embed_tokens"].inputs.dtype == np.int64
    assert samples["lm_head"].gradients.shape[1] == families.VOCABULARY


def test_memory_is_bounded_by_the_number_of_samples(
    frozen: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "LARGEST", 20 * (families.VOCABULARY + families.WIDTH))
    samples = Collector(frozen, tmp_path, 0).run(items(8), lambda _: None)
    assert 10 < len(samples["lm_head"].inputs) <= 20 < len(samples["model.layers.0.self_attn.q_proj"].inputs)


def test_predicted_damage_is_near_the_measured_divergence(tmp_path: Path) -> None:
    folder = families.make("llama", tmp_path / "llama", scale=0.5)
    with reference.reference(source.resolve(str(folder)), stream=False) as decoder:
        rows = run(decoder, Precision("int4-32"), 96).report["measured"]["rows"]
    plan = next(row for row in rows if row["name"] == "plan")
    assert plan["divergence"] > 0
    assert 0.5 < plan["damage"] / plan["divergence"] < 2


def test_the_plan_keeps_its_budget_and_beats_the_rules_by_prediction(frozen: Decoder) -> None:
    before = {n: p.clone() for n, p in frozen.model.named_parameters()}
    found = run(frozen, Precision("auto", bits=5.5))
    assert 5.0 < found.plan.bits <= 5.5
    rows = {row["name"]: row for row in found.report["measured"]["rows"]}
    assert list(rows) == ["unquantized", "plan", "uniform int4", "last layers", "Fisher trace"]
    for name in ("last layers", "Fisher trace"):
        assert rows[name]["bytes"] <= rows["plan"]["bytes"]
        assert rows["plan"]["damage"] <= rows[name]["damage"] + 1e-12
    assert rows["unquantized"]["divergence"] == 0 and rows["unquantized"]["drop"] == 0
    assert {n: g.weights for n, g in found.plan.groups.items()}[QKV]
    assert set(found.weights) == {w for g in found.plan.groups.values() for w in g.weights}
    for name, one in frozen.model.named_parameters():
        assert torch.equal(one, before[name]), "the model is left as it was"


def test_bytes_are_a_budget_too(frozen: Decoder) -> None:
    size = run(frozen, Precision("auto", bytes=110_000)).plan.bytes
    assert 90_000 < size <= 110_000
    with pytest.raises(OptionError, match="below"):
        run(frozen, Precision("auto", bits=3.0))


def test_a_plan_is_followed_and_measured_anew(frozen: Decoder, tmp_path: Path) -> None:
    written = run(frozen, Precision("auto", bits=6.0)).plan
    path = tmp_path / "mine.toml"
    path.write_text(written.to_toml().replace('format = "int8"', 'format = "fp16"'))
    wanted = Precision.parse(str(path), None, None)
    with_data = run(frozen, wanted)
    assert with_data.plan.formats == {n: "fp16" if f == "int8" else f for n, f in written.formats.items()}
    assert with_data.plan.bytes > written.bytes and with_data.plan.budget == "as in mine.toml"
    without = Planner(frozen, wanted, "float32", 0, lambda *_: None).run([], [])
    assert without.plan.formats == with_data.plan.formats and without.report["measured"] is None
    path.write_text(written.to_toml().replace("layers.3", "layers.9"))
    for fitting in (items(4), []):
        with pytest.raises(OptionError, match=r"layers\.[39]"):
            Planner(frozen, Precision.parse(str(path), None, None), "float32", 0, lambda *_: None).run(fitting, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("auto", 5.0, 1000), "one of them"),
        (("int8", 5.0, None), "--precision auto"),
        (("int9", None, None), "no precision 'int9'"),
        (("auto", 99.0, None), "1 to 32"),
        (("auto", None, 0), "above 0"),
        (("missing.toml", None, None), "cannot be read"),
        (("plan.toml", 5.0, None), "beside a plan"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[Any, Any, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Precision.parse(*arguments)


def test_defaults() -> None:
    assert not Precision.parse(None, None, None).wanted
    assert Precision.parse(None, 4.8, None) == Precision("auto", 4.8)
    assert Precision.parse("int4", None, None).format == "int4-32"


def test_auto_needs_data(frozen: Decoder) -> None:
    with pytest.raises(OptionError, match="--calib"):
        run(frozen, Precision("auto"), 0)
