"""fstq_export.sensitivity and precision: damage by hand, predictions against measured divergence, plans and rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")

import torch
from fstq_export import meter, precision, reference, sensitivity, source
from fstq_export.precision import Planner
from fstq_export.sensitivity import Collector, Damage, Samples, Site, Weight
from fstq_export.wanted import Precision
from torch import nn

from fstq_infer import device
from fstq_infer.errors import OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.quant.codes import Quantized, quantize, rounded_inputs
from fstq_infer.quant.formats import FORMATS
from fstq_infer.quant.latency import Profile, Roofline, Target

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


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4-32"])
def test_rounding_of_inputs_counts_as_an_engine_rounds(frozen: Decoder, tmp_path: Path, form: str) -> None:
    """By hand, on the samples that nothing was fitted to; the wider the blocks of inputs, the more."""
    collector = Collector(frozen, tmp_path, 0)
    samples = collector.run(items(8), lambda _: None)
    name = "model.layers.0.mlp.down_proj"
    damage = Damage(collector.weights[name], samples)
    codes, found = damage.quantized(FORMATS[form])
    x, g = samples[name].inputs[:: sensitivity.HELD], samples[name].gradients[:: sensitivity.HELD]
    off = rounded_inputs(x, FORMATS[form]) @ codes.dequantize().T - x @ collector.weights[name].matrix.T
    assert found == pytest.approx(float(((g * off) ** 2).sum()) / 2 / len(g), rel=1e-3)
    alone = Quantized(FORMATS["fp32"], codes.dequantize())
    assert found > damage.of(alone)


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "int4-32", "int4-128"])
def test_torch_and_numpy_round_inputs_alike(form: str) -> None:
    x = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * np.float32([[0.1], [1], [10], [0], [3]])
    given = torch.from_numpy(x).requires_grad_()
    found = meter.rounded(given.view(1, 5, 40), FORMATS[form])
    np.testing.assert_allclose(found[0].detach().numpy(), rounded_inputs(x, FORMATS[form]), atol=1e-6)
    found.sum().backward()
    assert given.grad is not None and bool((given.grad == 1).all())


def test_the_fastest_plan_within_a_latency(frozen: Decoder) -> None:
    """A device on which int8-dynamic is fast and int4 slow; times are additive, the head sees one token."""
    shapes = {one.matrix.shape for one in sensitivity.weights(frozen).values()}
    rates = {"int8-dynamic": 1e-6, "int8": 3e-6, "int4-32": 2e-6, "int4-64": 2e-6, "int4-128": 2e-6}
    kernels = {
        (*shape, form, tokens): rates.get(form, 4e-6) * tokens
        for shape in shapes for form in FORMATS for tokens in (1, 16)
    }  # fmt: skip
    device = Profile("a board", Roofline(1e9, 1e9), kernels)

    def planned(budget: str) -> Any:
        wanted = Precision("auto", latency=Target.parse(budget), profile=device, tune=0)
        return Planner(frozen, wanted, "float32", 0, lambda *_: None).run(items(24), items(8, 900)).plan

    linear = 7 * families.LAYERS
    fast = planned(f"{(linear * 16 + 1) * 1e-6 * 1.001}@16")  # too little for anything slower
    assert set(fast.formats.values()) == {"int8-dynamic"}
    assert fast.latency == pytest.approx((linear * 16 + 1) * 1e-6)
    assert "latency = " in fast.to_toml() and 'latency_of = "16 prompt tokens; a board"' in fast.to_toml()
    free = planned("1")
    assert free.damage < fast.damage and free.latency > (linear + 1) * 3e-6 and free.budget == "1 s for a decoded token"
    between = planned(f"{(linear * 16 + 1) * 2.5e-6}@16")
    assert fast.latency < between.latency <= (linear * 16 + 1) * 2.5e-6 and between.damage < fast.damage
    with pytest.raises(OptionError, match=r"seconds is below"):
        planned("1e-6@16")


def test_without_a_profile_this_machine_is_the_device(frozen: Decoder) -> None:
    wanted = Precision.parse(None, None, None, "10@8", tune=0)
    plan = Planner(frozen, wanted, "float32", 0, lambda *_: None).run(items(24), items(8, 900)).plan
    assert 0 < plan.latency < 10 and plan.latency_of == "8 prompt tokens; roofline of the exporting machine"


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


def test_of_many_texts_no_more_run_than_samples_need(
    frozen: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "MOST", 256)
    done: list[int] = []
    collector = Collector(frozen, tmp_path, 0)
    texts = items(200)
    assert len(collector._enough(texts)) == 34 and collector._enough(texts[:8]) == texts[:8]
    samples = collector.run(texts, done.append)
    assert done[-1] == 200
    assert all(200 < len(one.gradients) <= 256 for one in samples.values())


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


def test_long_texts_over_a_large_vocabulary_are_compared_in_part(
    frozen: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary: int = frozen.model.config.vocab_size
    monkeypatch.setattr(meter, "REFERENCE", 3 * vocabulary)  # three tokens of the first batch fit
    measure = meter.Meter(frozen, items(6))
    assert measure.measure()["divergence"] == 0
    known = sensitivity.weights(frozen)
    codes = {name: quantize(np.ascontiguousarray(weight.matrix), FORMATS["int4-32"]) for name, weight in known.items()}
    with meter.quantized(known, codes):
        assert measure.measure()["divergence"] > 0


def test_devices_and_formats_have_to_fit(frozen: Decoder, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--target-latency or --precision"):
        Precision.parse(None, None, None, profile="orin-nano")
    board = (device.folder() / "orin-nano.toml").read_text(encoding="utf-8")
    (tmp_path / "odd.toml").write_text(re.sub(r"formats = \[.*\]", 'formats = ["bf16"]', board), encoding="utf-8")
    for asked in ("auto", "int8"):
        wanted = Precision.parse(asked, None, None, profile=str(tmp_path / "odd.toml"))
        with pytest.raises(OptionError, match="it has bf16"):
            Planner(frozen, wanted, "float32", 0, lambda *_: None)
