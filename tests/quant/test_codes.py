"""fstq_infer.quant.formats and codes: sizes by hand, round trips, searched scales, errors that are passed on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fstq_infer.errors import OptionError
from fstq_infer.quant.codes import Quantized, compensated, quantize, round_to, search_scales
from fstq_infer.quant.formats import E2M1_TWICE, E4M3, FORMATS, named

SCALED = [form for form in FORMATS.values() if form.is_scaled]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrices() -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))
    return arrays.arrays(np.float32, shapes, elements=st.floats(-100, 100, width=32))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "size"),
    [
        ("fp32", 3, 10, 120),
        ("bf16", 3, 10, 60),
        ("int8", 3, 10, 30 + 6),  # a scale of two bytes for each row
        ("int4-32", 2, 64, 64 + 2 * 2 * 2),
        ("int4-32", 2, 65, 65 + 2 * 3 * 2),  # the last block holds one column
        ("int4-128", 3, 5, 8 + 3 * 2),  # 15 codes need eight bytes
        ("fp8", 3, 10, 30 + 6),
        ("nvfp4", 3, 40, 60 + 3 * 3),  # a scale of one byte for 16
    ],
)
def test_bytes_count_packed_codes_and_scales(name: str, rows: int, columns: int, size: int) -> None:
    assert FORMATS[name].bytes(rows, columns) == size


def test_unknown_format_gets_a_suggestion() -> None:
    with pytest.raises(OptionError, match="did you mean 'int4-64'"):
        named("int4_64")


def test_codes_by_hand() -> None:
    weight = np.array([[7.0, -3.4, 0.4, -8.0]], np.float32)
    codes = round_to(weight, np.array([[1.0]], np.float16), FORMATS["int4-32"])
    assert codes.tolist() == [[7, -3, 0, -8]]
    assert round_to(weight, np.array([[0.5]], np.float16), FORMATS["int4-32"]).tolist() == [[7, -7, 1, -8]]
    found = Quantized(FORMATS["int4-32"], codes, np.array([[0.5]], np.float16))
    assert found.dequantize().tolist() == [[3.5, -1.5, 0.0, -4.0]]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@given(weight=matrices())
@settings(max_examples=25, deadline=None)
def test_what_a_format_can_hold_it_keeps(form, weight: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    """Dequantized weights quantize to themselves with the same scales, and codes stay within the levels."""
    once = quantize(weight, form)
    assert once.codes.shape == weight.shape and np.isfinite(once.dequantize()).all()
    if not form.is_scaled:
        np.testing.assert_allclose(once.dequantize(), weight, rtol=2.0**-7, atol=1e-7)
        return
    low, high = form.levels if form.is_integer else (-form.largest, form.largest)
    assert once.codes.dtype == (np.float16 if form.name == "fp8" else np.int8)
    assert once.codes.min() >= low and once.codes.max() <= high
    assert once.scales is not None and once.scales.shape == (len(weight), form.blocks(weight.shape[1]))
    assert (once.scales > 0).all()
    again = round_to(once.dequantize(), once.scales, form)
    np.testing.assert_array_equal(again, once.codes)


@pytest.mark.parametrize("form", SCALED, ids=lambda form: form.name)
def test_searched_scales_beat_the_largest_weight(form) -> None:  # type: ignore[no-untyped-def]
    weight = normal(8, 96)
    weight[:, 0] *= 5  # an outlier in each row
    peak = np.abs(weight).max(1, keepdims=True) / form.largest
    plain = Quantized(form, round_to(weight, np.repeat(peak, form.blocks(96), 1).astype(np.float16), form))
    scales = search_scales(weight, form)
    searched = Quantized(form, round_to(weight, scales, form), scales).dequantize()
    reached = plain.codes * peak.astype(np.float16).astype(np.float32)
    assert ((searched - weight) ** 2).sum() < ((reached - weight) ** 2).sum()


def test_importance_moves_the_scale_to_what_matters() -> None:
    weight = np.array([[8.0, 0.3, -0.3, 0.3]], np.float32)
    small = np.array([[0.0, 1.0, 1.0, 1.0]], np.float32)
    found = quantize(weight, FORMATS["int4-32"], small).dequantize()
    np.testing.assert_allclose(found[0, 1:], weight[0, 1:], atol=0.35)
    big = quantize(weight, FORMATS["int4-32"], 1 - small).dequantize()
    np.testing.assert_allclose(big[0, 0], 8.0, rtol=1e-3)


def test_rounding_errors_make_up_for_each_other() -> None:
    mixed = normal(400, 48) @ normal(48, 48, seed=1)
    moments = (mixed.T @ mixed / 400).astype(np.float64)
    weight, form = normal(16, 48, seed=2), FORMATS["int4-32"]

    def error(found: Quantized) -> float:
        return float((((found.dequantize() - weight) @ mixed.T) ** 2).mean())

    assert error(quantize(weight, form, None, moments)) < 0.8 * error(quantize(weight, form))


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, form = normal(4, 70), FORMATS["int4-32"]
    scales = search_scales(weight, form)
    moments = np.diag(np.linspace(1, 2, 70))
    np.testing.assert_array_equal(compensated(weight, scales, form, moments), round_to(weight, scales, form))


def test_two_columns_by_hand() -> None:
    """Equal inputs: what the first column loses the second takes over."""
    weight, scales = np.array([[1.4, 1.4]], np.float32), np.array([[1.0]], np.float16)
    moments = np.array([[1.0, 0.999], [0.999, 1.0]])
    assert compensated(weight, scales, FORMATS["int4-32"], moments).tolist() == [[1, 2]]


def test_rows_are_independent() -> None:
    found = quantize(normal(6, 40), FORMATS["int4-32"])
    part = found.rows(np.array([4, 1]))
    np.testing.assert_array_equal(part.dequantize(), found.dequantize()[[4, 1]])


def test_bfloat16_rounds_to_nearest_even() -> None:
    weight = np.array([[1.0, 1.00390625, 1.01171875, -3.0e38]], np.float32)  # ties between neighbours 2^-7 apart
    assert quantize(weight, FORMATS["bf16"]).dequantize()[0, :3].tolist() == [1.0, 1.0, 1.015625]


@given(numbers=arrays.arrays(np.float32, 50, elements=st.floats(-1000, 1000, width=32)))
@settings(max_examples=200, deadline=None)
def test_small_floats_are_those_of_ml_dtypes(numbers: np.ndarray) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the 'ort' extra has it")
    eight = np.clip(numbers, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(E4M3.nearest(numbers), eight)
    four = (np.clip(numbers, -12, 12) / 2).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2
    np.testing.assert_array_equal(E2M1_TWICE.nearest(numbers), four)


@given(matrices(), st.sampled_from([1e-9, 1e-4, 1.0, 1e4]))
@settings(max_examples=100, deadline=None)
def test_scales_of_nvfp4_are_e4m3_times_one_power_of_two(weight: np.ndarray, size: float) -> None:
    float4 = pytest.importorskip("fstq_engines.tensorrt.float4", reason="lowering needs onnx-ir")
    found = quantize(weight * np.float32(size), FORMATS["nvfp4"])
    assert found.scales is not None
    parts, whole = float4.split(found.scales.astype(np.float32))
    np.testing.assert_array_equal(parts.astype(np.float32) * whole, found.scales.astype(np.float32))
    assert float(np.log2(whole)).is_integer() and parts.astype(np.float32).max() <= 448


def test_what_small_floats_lose() -> None:
    """Relative error of normal numbers: e4m3 as three bits of mantissa have it, e2m1 near int4 with shorter blocks."""
    weight = normal(64, 128)

    def error(name: str) -> float:
        return float(np.linalg.norm(quantize(weight, FORMATS[name]).dequantize() - weight) / np.linalg.norm(weight))

    assert 0.5 * 2**-5 < error("fp8") < 2**-5 < error("nvfp4") < 1.1 * error("int4-32")
