"""fstq_infer.quant.latency: text and back, what is read between measured points, rooflines, and targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer import device
from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import FORMATS
from fstq_infer.quant.latency import DYNAMIC_RATE, Profile, Roofline, Target, costs_in, costs_on

ROOF = Roofline(1e9, 1e10)
PROFILE = Profile(
    "a board, 2 threads", ROOF, {(8, 4, "int8", 1): 1e-4, (8, 4, "int8", 101): 2.1e-3, (8, 4, "fp32", 1): 3e-4}
)


def test_text_and_back() -> None:
    assert costs_in(PROFILE.to_toml().encode(), "p.toml") == PROFILE
    assert costs_in(Profile("bare", ROOF).to_toml().encode(), "p.toml") == Profile("bare", ROOF)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1e-4), (101, 2.1e-3), (51, 1.1e-3), (202, 4.2e-3)])
def test_times_between_and_beyond_what_was_measured(tokens: int, expected: float) -> None:
    assert PROFILE.seconds(8, 4, "int8", tokens) == pytest.approx(expected)


def test_other_shapes_and_formats_come_from_the_roofline_by_hand() -> None:
    assert PROFILE.seconds(1000, 1000, "fp32", 1) == pytest.approx(4e6 / 1e9)  # read
    assert PROFILE.seconds(1000, 1000, "fp32", 1000) == pytest.approx(2e9 / 1e10)  # computed
    assert PROFILE.seconds(1000, 1000, "int4-32", 1) == pytest.approx(564_000 / 1e9)
    assert ROOF.seconds(1000, 1000, "int8-dynamic", 1000) == pytest.approx(2e9 / 1e10 / DYNAMIC_RATE)


def test_a_roofline_is_measured() -> None:
    found = Roofline.measured()
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.rate < 1e14


kernels = st.dictionaries(
    st.tuples(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(list(FORMATS)), st.integers(1, 10**5)),
    st.floats(1e-9, 1e3).map(lambda s: float(f"{s:.6g}")),
    max_size=8,
)


@given(st.text(max_size=30), kernels)
@settings(max_examples=50, deadline=None)
def test_any_profile_comes_back(device: str, found: dict[tuple[int, int, str, int], float]) -> None:
    again = costs_in(Profile(device, ROOF, found).to_toml().encode(), "p.toml")
    assert again.kernels == found and again.roofline == ROOF
    assert again.device == device or not device.isprintable()


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(OptionError, match=r"^here\.toml"):
        costs_in(data, "here.toml")


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap("version = 1", "version = 2"), "format and version"),
        (swap("fstq-profile", "fstq-plan"), "format and version"),
        (swap("bandwidth", "bandwith"), "'bandwidth'"),
        (swap("bandwidth = 1e+09", "bandwidth = 0"), "'bandwidth' must be a number above 0"),
        (swap("rate = 1e+10", "rate = nan"), "'rate' must be a number above 0"),
        (swap("outputs = 8", "outputs = 0"), "kernel 1: 'outputs' must be at least 1, found 0"),
        (swap("tokens = 1", "tokens = true"), "kernel 1: 'tokens' must be of type int"),
        (swap('"fp32"', '"fp31"'), "kernel 1: there is no format 'fp31'"),
        (swap("seconds = 0.0003", "seconds = -1"), "'seconds' must be a number above 0"),
        (lambda text: text + "speed = 1\n", "no key 'speed'"),
        (lambda text: text + "#" * (4 << 20), "are read"),
    ],
)
def test_a_wrong_profile_says_what_is_wrong(change: Callable[[str], str], words: str) -> None:
    with pytest.raises(OptionError, match=r"^p\.toml") as caught:
        costs_in(change(PROFILE.to_toml()).encode(), "p.toml")
    assert words in str(caught.value)


def test_a_profile_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be read.*fstq build --profile"):
        costs_on(str(tmp_path / "none.toml"))


def test_targets() -> None:
    assert Target.parse("0.02") == Target(0.02, 1) and Target.parse("0.5@1024") == Target(0.5, 1024)
    assert str(Target(0.02)) == "0.02 s for a decoded token" and str(Target(0.5, 7)) == "0.5 s for 7 prompt tokens"


@pytest.mark.parametrize("given", ["", "fast", "0", "-1", "nan", "inf", "0.5@", "0.5@x", "0.5@0", "0.5@1.5", "1@2@3"])
def test_targets_that_mean_nothing(given: str) -> None:
    if given == "0.5@":
        assert Target.parse(given).tokens == 1
        return
    with pytest.raises(OptionError, match="target"):
        Target.parse(given)


def test_boards_are_named_with_or_without_a_power_mode(tmp_path: Path) -> None:
    found, slow = costs_on("orin-nano"), costs_on("orin-nano@15W")
    assert "Orin Nano 8GB, 25W" in found.device and "15W" in slow.device
    matrix = (4864, 896)
    for tokens in (1, 1024):
        assert 0 < found.seconds(*matrix, "int4-128", tokens) < slow.seconds(*matrix, "int4-128", tokens)
    assert found.seconds(*matrix, "int4-128", 1) < found.seconds(*matrix, "fp16", 1)
    board = tmp_path / "mine.toml"
    board.write_bytes((device.folder() / "orin-nano.toml").read_bytes())
    assert costs_on(str(board)).seconds(*matrix, "int8", 7) == found.seconds(*matrix, "int8", 7)
    measured = tmp_path / "measured.toml"
    measured.write_text(PROFILE.to_toml(), encoding="utf-8")
    assert costs_on(str(measured)) == PROFILE
    for wrong, message in (("orin-nana", "did you mean"), ("orin-nano@16W", "power mode"), ("none.toml", "orin-nano")):
        with pytest.raises(OptionError, match=message):
            costs_on(wrong)
