"""fstq_export.tune: trained codes against those they began with, what is left alone, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")

import torch
from fstq_export import reference, source, tune
from fstq_export.meter import Meter, quantized
from fstq_export.precision import Planner
from fstq_export.sensitivity import Damage, Weight, weights
from fstq_export.wanted import Precision

from fstq_infer.errors import ExportError, OptionError
from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.quant.codes import Quantized, quantize
from fstq_infer.quant.formats import FORMATS, Format

from . import families


def items(count: int, seed: int = 0) -> list[Item]:
    return [Item(tuple(families.ids(20, seed + i)), ()) for i in range(count)]


def rounded(decoder: Decoder, form: str) -> dict[str, Quantized]:
    return {name: quantize(np.ascontiguousarray(one.matrix), FORMATS[form]) for name, one in weights(decoder).items()}


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def frozen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose head and embedding are one, and one whose linear layers are stored turned."""
    folder = families.make(request.param, tmp_path_factory.mktemp(request.param), scale=0.5)
    with reference.reference(source.resolve(str(folder)), stream=False) as decoder:
        yield decoder


def test_training_brings_the_model_nearer_and_leaves_it_as_it_was(frozen: Decoder) -> None:
    before = {name: one.clone() for name, one in frozen.model.named_parameters()}
    codes, done = rounded(frozen, "int4-32"), []
    found = tune.tune(frozen, weights(frozen), codes, items(96), 40, 0, done.append)
    assert done == list(range(1, 41)) and found.asked == 40 and found.steps > 0
    assert found.after < 0.95 * found.before
    for name, one in frozen.model.named_parameters():
        assert torch.equal(one, before[name]) and not one.requires_grad and one.grad is None
    for name, one in found.codes.items():
        low, high = one.format.levels
        assert one.codes.dtype == np.int8 and low <= one.codes.min() and one.codes.max() <= high
        assert (
            one.scales is not None and one.scales.dtype == np.float16 and one.scales.shape == codes[name].scales.shape
        )
    meter = Meter(frozen, items(24, seed=1000))  # texts that nothing was fitted to
    meter.measure()
    losses = []
    for made in (codes, found.codes):
        with quantized(weights(frozen), made):
            losses.append(meter.measure()["divergence"])
    assert losses[1] < losses[0]


def test_the_same_seed_gives_the_same_codes(frozen: Decoder) -> None:
    one, two = (tune.tune(frozen, weights(frozen), rounded(frozen, "int4-32"), items(40), 4, 3) for _ in range(2))
    assert one.after == two.after
    assert all(np.array_equal(one.codes[name].codes, two.codes[name].codes) for name in one.codes)


def test_worse_codes_are_not_kept(frozen: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CODE_RATE", 30.0)
    monkeypatch.setattr(tune, "SCALE_RATE", 1.0)
    codes = rounded(frozen, "int4-32")
    found = tune.tune(frozen, weights(frozen), codes, items(40), 6, 0)
    assert found.steps == 0 and found.after == found.before and found.codes == codes


def test_floating_point_formats_stay(frozen: Decoder) -> None:
    codes = rounded(frozen, "int4-32")
    name = next(iter(codes))
    codes |= {name: rounded(frozen, "fp16")[name]}
    found = tune.tune(frozen, weights(frozen), codes, items(40), 4, 0)
    assert found.codes[name] is codes[name]
    halves = rounded(frozen, "bf16")
    assert tune.tune(frozen, weights(frozen), halves, items(40), 4, 0).steps == 0


def test_a_latent_matrix_begins_as_it_was_rounded(frozen: Decoder) -> None:
    known: dict[str, Weight] = weights(frozen)
    for name, one in rounded(frozen, "int4-64").items():
        latent = tune.Latent(known[name], one)
        again = latent.quantized()
        np.testing.assert_array_equal(again.codes, one.codes)
        np.testing.assert_array_equal(again.scales, one.scales)
        stored = known[name].sites[0].module.weight
        assert latent.number().shape == stored.shape
        latent.number().sum().backward()
        assert latent.codes.grad is not None and latent.scales.grad is not None
        assert float(latent.codes.grad.abs().min()) > 0


def test_targets_that_stay_are_those_computed_anew(frozen: Decoder) -> None:
    """Half precision ones, text by text, whatever else is in the batch."""
    texts = [Item(tuple(families.ids(8 + 3 * i, i)), ()) for i in range(6)]
    kept, fresh = tune._Targets(frozen, texts, 1 << 20), tune._Targets(frozen, texts, 0)
    assert fresh.most == 0 and kept.most == 512 * sum(map(len, texts))
    for indices in ([4, 1, 2], [2, 5, 4], [0, 3]):
        one, two = kept.of(indices), fresh.of(indices)
        assert one.shape == (sum(len(texts[i]) - 1 for i in indices), 512)
        torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-3)
    assert not fresh._kept and set(kept._kept) == set(range(6))


def test_too_few_texts(frozen: Decoder) -> None:
    with pytest.raises(OptionError, match=r"7 texts are too few.*--tune-codes 0"):
        tune.tune(frozen, weights(frozen), rounded(frozen, "int4-32"), items(9), 4, 0)


def test_too_little_memory(frozen: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "available_memory", lambda: 1 << 20)
    with pytest.raises(OptionError, match=r"needs about .* GiB of memory, but 0.0 GiB are available.*--tune-codes 0"):
        tune.tune(frozen, weights(frozen), rounded(frozen, "int4-32"), items(40), 4, 0)


def test_memory_decides_where_nothing_was_asked_for(
    frozen: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tune, "available_memory", lambda: 1 << 20)
    planner = Planner(frozen, Precision("int4-32"), "float32", 0, lambda *_: None)
    planner.rivals = False
    assert planner.run(items(64), items(8, 500)).plan.trained is None
    assert "codes are not trained" in caplog.text


def test_a_loss_that_is_no_number(frozen: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.functional, "kl_div", lambda *_, **__: torch.tensor(float("nan"), requires_grad=True))
    monkeypatch.setattr(Meter, "measure", lambda _: {"divergence": 1.0})
    with pytest.raises(ExportError, match=r"loss of nan in step 1.*--tune-codes 0"):
        tune.tune(frozen, weights(frozen), rounded(frozen, "int4-32"), items(40), 4, 0)


def test_a_plan_is_trained_when_asked_for(frozen: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nearest codes: those that pass errors on are hard to better within a few steps on weights without sense."""

    def nearest(self: Damage, form: Format) -> tuple[Quantized, float]:
        made = quantize(np.ascontiguousarray(self.weight.matrix), form)
        return made, self.of(made)

    monkeypatch.setattr(Damage, "quantized", nearest)

    def planned(steps: int | None, count: int = 60) -> Any:
        planner = Planner(frozen, Precision("int4-32", tune=steps), "float32", 0, lambda *_: None)
        planner.rivals = False
        return planner.run(items(count), items(24, 1000))

    plain, trained = planned(0), planned(40, 96)
    names = [row["name"] for row in trained.report["measured"]["rows"]]
    assert names == ["unquantized", "plan", "plan, codes not trained"]
    rows = {row["name"]: row for row in trained.report["measured"]["rows"]}
    assert rows["plan"]["divergence"] < rows["plan, codes not trained"]["divergence"]
    assert plain.plan.trained is None and trained.plan.trained > 0
    assert rows["plan"]["damage"] == trained.plan.divergence
    assert "trained = " in trained.plan.to_toml() and type(trained.plan).from_toml(trained.plan.to_toml().encode())
    assert planned(None).plan.trained is None  # so few texts are not trained on unasked
    with pytest.raises(OptionError, match="--calib"):
        Planner(frozen, Precision("int4-32", tune=5), "float32", 0, lambda *_: None).run([], [])


def test_small_models_are_trained_by_default() -> None:
    assert [tune.default_steps(size) for size in (10**5, 3 * 10**6, 10**8)] == [1000, 200, 0]


@pytest.mark.parametrize("steps", [-1, 10**6])
def test_steps_that_are_not_possible(steps: int) -> None:
    with pytest.raises(OptionError, match="tune-codes"):
        Precision("int4-32", tune=steps)


def test_training_needs_formats() -> None:
    with pytest.raises(OptionError, match="--precision"):
        Precision.parse(None, None, None, tune=10)
