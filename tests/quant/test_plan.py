"""fstq_infer.quant.plan: text and back, totals by hand, and every way a file can be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import FORMATS
from fstq_infer.quant.plan import Group, Plan

PLAN = Plan(
    {
        "model.embed_tokens": Group(("model.embed_tokens",), "int8", 0.25, 3000, 2400),
        "model.layers.0.mlp.gate_proj+up_proj": Group(("gate", "up"), "int4-32", 0.5, 1000, 1600),
    },
    "5 bits per weight",
)
KNOWN = {name: group.weights for name, group in PLAN.groups.items()}


def test_totals_by_hand() -> None:
    assert (PLAN.bytes, PLAN.bits, PLAN.damage) == (4000, 8.0, 0.75)


def test_text_and_back() -> None:
    text = PLAN.to_toml()
    assert Plan.from_toml(text.encode()) == PLAN
    head = text.splitlines()
    assert {'budget = "5 bits per weight"', "bits = 8.0000", "bytes = 4000", "damage = 0.75"} <= set(head)
    PLAN.check(KNOWN)


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.isprintable)
groups = st.builds(
    Group,
    st.lists(names, min_size=1, max_size=3).map(tuple),
    st.sampled_from(list(FORMATS)),
    st.integers(0, 10**6).map(lambda n: n / 1024),
    st.integers(0, 2**40),
    st.integers(1, 2**40),
)


@given(st.dictionaries(names, groups, min_size=1, max_size=4), names)
@settings(max_examples=50, deadline=None)
def test_any_plan_comes_back(found: dict[str, Group], budget: str) -> None:
    plan = Plan(found, budget)
    again = Plan.from_toml(plan.to_toml().encode())
    assert again.formats == plan.formats and again.budget == budget and again.bytes == plan.bytes
    assert {n: g.weights for n, g in again.groups.items()} == {n: g.weights for n, g in found.items()}


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(OptionError, match=r"^here\.toml"):
        Plan.from_toml(data, "here.toml")


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap('"int4-32"', '"int5-32"'), "no format 'int5-32'; did you mean 'int4-32'"),
        (swap("parameters", "parameter"), "no key 'parameter'; did you mean 'parameters'"),
        (swap("version = 1", "version = 2"), "version"),
        (swap("damage = 0.5", 'damage = "much"'), "'damage' must be a number"),
        (swap("damage = 0.5", "damage = nan"), "'damage' must be a number"),
        (swap("damage = 0.5", "damage = -1"), "at least 0"),
        (swap("bytes = 1000", "bytes = true"), "'bytes' must be of type int"),
        (swap('weights = ["gate", "up"]', "weights = []"), "list of names"),
        (swap('[groups."model.embed_tokens"]', '[group."model.embed_tokens"]'), "no key 'group'"),
        (lambda text: text + text, "no TOML"),
    ],
)
def test_a_wrong_file_is_refused(change: Callable[[str], str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Plan.from_toml(change(PLAN.to_toml()).encode())


def test_another_models_plan_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no group 'model\.embed_tokens'; did you mean 'model\.embed_token'"):
        PLAN.check({"model.embed_token": ("x",), **dict(list(KNOWN.items())[1:])})
    with pytest.raises(OptionError, match="no format is given for 1 groups"):
        PLAN.check(KNOWN | {"lm_head": ("lm_head",)})
    with pytest.raises(OptionError, match="its weights are"):
        PLAN.check(KNOWN | {"model.embed_tokens": ("other",)})
