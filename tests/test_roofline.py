"""The roofline: by hand, its laws, and against published speeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer import device, forecast
from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import CPU_FORMATS
from fstq_infer.roofline import Decoder, Linear, attention_seconds, linear_seconds, predict, weight_bytes

NANO = device.find("orin-nano").in_mode("MAXN_SUPER")
SHAPE = {"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 512, "vocabulary": 1000}
SMALL = forecast.published_decoder(SHAPE, "fp16")


def test_weight_bytes() -> None:
    assert weight_bytes(10, 100, "fp16") == 2000
    assert weight_bytes(10, 128, "int4-32") == 640 + 10 * 4 * 2
    assert weight_bytes(10, 128, "fp8") == 1280 + 20
    assert weight_bytes(10, 128, "nvfp4") == 640 + 80
    with pytest.raises(OptionError, match="did you mean 'nvfp4'"):
        weight_bytes(1, 1, "nvfp")


def test_one_token_waits_for_memory() -> None:
    moved = weight_bytes(4864, 896, "fp16") + (4864 + 896) * 2
    assert linear_seconds(NANO, 4864, 896, "fp16", 1) == pytest.approx(moved / (102e9 * 0.8))


def test_many_tokens_wait_for_arithmetic() -> None:
    assert linear_seconds(NANO, 4864, 896, "fp16", 4096) == pytest.approx(2 * 4864 * 896 * 4096 / (16.7e12 * 0.4))
    quick = linear_seconds(NANO, 4864, 896, "int8-dynamic", 4096)
    assert quick == pytest.approx(linear_seconds(NANO, 4864, 896, "int8", 4096) / 2, rel=0.01)


def test_formats_that_a_device_lacks() -> None:
    with pytest.raises(OptionError, match=r"Orin Nano 8GB \(SM 8.7\) has no nvfp4"):
        linear_seconds(NANO, 64, 64, "nvfp4", 1)
    assert linear_seconds(device.find("thor"), 64, 64, "nvfp4", 1) > 0


def test_attention_by_hand() -> None:
    assert attention_seconds(NANO, 14, 2, 64, 1, 1000) == pytest.approx(2 * 64 * (4000 + 28) / (102e9 * 0.8))
    assert attention_seconds(NANO, 14, 2, 64, 4096, 4096) == pytest.approx(4 * 14 * 64 * 4096**2 / (16.7e12 * 0.4))


sizes = st.integers(1, 8192)


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, st.integers(1, 4096), st.sampled_from(CPU_FORMATS), st.sampled_from(device.names()))
def test_laws_of_linear_layers(n: int, k: int, tokens: int, form: str, name: str) -> None:
    profile = device.find(name)
    seconds = linear_seconds(profile, n, k, form, tokens)
    assert 0 < seconds <= linear_seconds(profile, n, k, form, tokens + 1)
    assert seconds <= linear_seconds(profile, n + 1, k, form, tokens)
    for mode in profile.modes:
        assert linear_seconds(profile.in_mode(mode), n, k, form, tokens) > 0
    if form.startswith("int4"):
        assert seconds <= linear_seconds(profile, n, k, "fp32", tokens)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4096), st.integers(1, 256), st.integers(1, 3), st.data())
def test_pruning_saves_time_and_memory(prompt: int, new: int, stage: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, prompt))
    dense = predict(NANO, SMALL, prompt, new)
    pruned = predict(NANO, SMALL, prompt, new, (stage,), (kept,))
    assert pruned.ttft_s <= dense.ttft_s and pruned.kv_bytes <= dense.kv_bytes
    assert pruned.decode_tokens_per_s >= dense.decode_tokens_per_s
    share = (stage * (prompt + new) + (4 - stage) * (kept + new)) / (4 * (prompt + new))
    assert pruned.kv_bytes == pytest.approx(dense.kv_bytes * share)
    assert predict(NANO, SMALL, prompt, new, (stage,), (prompt,)).ttft_s == pytest.approx(dense.ttft_s)


def test_prediction_by_hand() -> None:
    """One layer of one matrix and one head: everything can be counted."""
    one = Decoder((Linear(64, 64, "fp16", 0, "w"),), ((1, 1, 64),), 8192, 64, 10)
    found = predict(NANO, one, 1, 1)
    seconds = 4e-3 + 50e-6 + (8192 + 256) / (102e9 * 0.8) + 2 * 64 * (2 + 2) / (102e9 * 0.8)
    assert found.ttft_s == pytest.approx(seconds) and found.end_to_end_s == found.ttft_s
    assert found.kv_bytes == 2 * 2 * 64 * 2
    assert found.total_bytes == 8192 + found.kv_bytes + found.activation_bytes + NANO.estimate.runtime_bytes


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    found = predict(NANO, replace(SMALL, stored=8 << 30), 128, 16)
    assert not found.fits and found.free_bytes == NANO.memory - NANO.estimate.system_bytes - found.total_bytes < 0


def test_tied_matrices_are_stored_once() -> None:
    tied = replace(SMALL, linears=(*SMALL.linears, SMALL.linears[-1]))
    assert tied.matrix_bytes == SMALL.matrix_bytes == SMALL.stored
    assert tied.stored_as("int8").stored == sum(weight_bytes(one.n, one.k, "int8") for one in SMALL.linears)


def test_published_speeds_are_within_a_factor_of_two() -> None:
    """NVIDIA's prefill times and decode speeds (jetson/profiles/published.toml), in each profile's default mode."""
    rows = [row for row in forecast.compare() if row["default"]]
    assert {(row["device"], row["model"], row["figure"]) for row in rows} == {
        (name, model, figure)
        for name in ("orin-nano", "orin-nx-16gb", "agx-orin-64gb", "thor")
        for model in ("qwen3-0_6b", "qwen3-1_7b")
        for figure in ("prefill_ms", "decode_tokens_per_s")
    }
    assert [row for row in rows if not row["within"]] == []


def test_devices_are_in_their_order() -> None:
    """The roofline ranks boards as the published figures do."""
    for model in ("qwen3-0_6b", "qwen3-1_7b"):
        rows = [row for row in forecast.compare() if row["model"] == model and row["default"] and row["prompt"] == 61]
        rows = [row for row in rows if row["figure"] == "decode_tokens_per_s"]
        speeds = {row["device"]: row["predicted"] for row in rows}
        assert speeds["orin-nano"] <= speeds["orin-nx-16gb"] < speeds["agx-orin-64gb"] < speeds["thor"]
