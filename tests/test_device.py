"""Device profiles: those that come along, against their data sheets; wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer import device
from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import FORMATS

TEXT = (device.folder() / "orin-nano.toml").read_text(encoding="utf-8")
# Data sheets: sparse INT8 TOPS of the GPU at the fastest clock (Thor: sparse FP8), GB/s, SM.
SHEETS = {
    "orin-nano": (67, 102, "8.7"),
    "orin-nx-8gb": (77, 102, "8.7"),
    "orin-nx-16gb": (77, 102, "8.7"),
    "agx-orin-32gb": (107, 205, "8.7"),
    "agx-orin-64gb": (170, 205, "8.7"),
    "thor": (1035, 273, "11.0"),
}


def test_all_devices_are_there() -> None:
    assert set(device.names()) == set(SHEETS)


@pytest.mark.parametrize("name", sorted(SHEETS))
def test_profiles_agree_with_data_sheets(name: str) -> None:
    profile = device.find(name)
    tops, bandwidth, sm = SHEETS[name]
    assert 2 * profile.peak["int8"] / 1e12 == pytest.approx(tops, rel=0.01)
    assert profile.peak["fp16"] == pytest.approx(profile.peak["int8"] / 2, rel=0.01)
    fastest = profile.in_mode("MAXN_SUPER" if "MAXN_SUPER" in profile.modes else "MAXN")
    assert fastest.mode.bandwidth == bandwidth * 1e9 and profile.sm == sm
    assert fastest.flops("int8") == profile.peak["int8"]
    assert set(profile.formats) <= set(FORMATS)
    assert ("nvfp4" in profile.formats) == ("fp4" in profile.peak) == (name == "thor")


def test_orin_computes_what_its_units_can() -> None:
    """4,096 INT8 operations a clock and SM: every Orin profile follows from its clock and number of SMs."""
    for name in device.names():
        profile = device.find(name)
        if profile.sm == "8.7":
            assert profile.peak["int8"] == pytest.approx(4096 * profile.peak_sms * profile.peak_mhz * 1e6, rel=0.01)


def test_orin_nano_has_the_modes_that_its_users_know() -> None:
    nano = device.find("orin-nano")
    assert list(nano.modes) == ["15W", "25W", "MAXN_SUPER"]
    slow = nano.in_mode("15w")
    assert slow.mode.bandwidth == 68e9 and slow.flops("fp16") == pytest.approx(0.6 * nano.peak["fp16"])
    with pytest.raises(OptionError, match="did you mean '25W'"):
        nano.in_mode("25")


def test_thirty_watts_switch_units_off() -> None:
    agx = device.find("agx-orin-64gb").in_mode("MODE_30W")
    assert agx.flops("fp16") == pytest.approx(agx.peak["fp16"] * 612 / 1301 / 2)


def test_matching() -> None:
    def match(text: str, gib: float) -> str | None:
        found = device.matching(text, round(gib * 2**30))
        return found.name if found else None

    assert match("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7.4) == "orin-nx-8gb"
    assert match("NVIDIA Jetson AGX Orin Developer Kit", 29.8) == "agx-orin-32gb"
    assert match("NVIDIA Jetson Orin Nano Developer Kit", 3.4) is None  # the 4GB module
    assert match("Raspberry Pi 5", 7.4) is None


def test_unknown_names() -> None:
    with pytest.raises(OptionError, match="did you mean 'orin-nano'"):
        device.find("orin_nano")
    with pytest.raises(OptionError, match="cannot be read"):
        device.find("nowhere.toml")
    with pytest.raises(OptionError, match=r"does not compute in fp8"):
        device.find("orin-nano").flops("fp8")


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace('title = "Jetson Orin Nano 8GB"', 'title = "Mine"'))
    assert device.find(str(path)).title == "Mine" and device.find(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('format = "fstq-device"', 'format = "other"', "expected"),
        ("version = 1", "version = 9", "expected"),
        ("fp16 = 16.7", "", "'fp16' is missing"),
        ("fp16 = 16.7", "fp16 = 0", "number above 0"),
        ("fp16 = 16.7", "fp61 = 16.7", "did you mean"),
        ("compute = 0.4", "compute = 4", "share of the peak"),
        ('default = "25W"', 'default = "26W"', "none of its modes"),
        ("bandwidth_gbs = 68", 'bandwidth_gbs = "68"', "number"),
        ("memory_gib = [6.0, 9.0]", "memory_gib = [9.0, 6.0]", "rising"),
        ('models = ["Orin Nano"]', "models = []", "not empty"),
        ("gpu_mhz = 612", "gpu_mhz = 612\nsms = 9", "1 to 8"),
        ("[peak]", "[peaks]", "no key 'peaks'"),
        ("[modes.15W]", "[modes", "no TOML"),
    ],
)
def test_wrong_profiles(old: str, new: str, words: str) -> None:
    assert old in TEXT
    with pytest.raises(OptionError, match=words) as caught:
        device.parse(TEXT.replace(old, new, 1).encode(), "x", "x.toml")
    assert str(caught.value).startswith("x.toml")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_profiles_raise_one_error(data: st.DataObject) -> None:
    text = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        device.parse(bytes(text), "x", "x.toml")
    except OptionError as error:
        assert str(error).startswith("x.toml") or "x has no" in str(error)


def test_huge_files_are_not_read() -> None:
    with pytest.raises(OptionError, match="at most"):
        device.parse(b"#" * (device.LARGEST + 1), "x", "x.toml")
