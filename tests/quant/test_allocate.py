"""fstq_infer.quant.allocate: the best choice by enumeration, budgets that hold, errors that say the least."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.errors import OptionError
from fstq_infer.quant.allocate import Choice, allocate

pytest.importorskip("scipy", reason="allocation needs scipy; it comes with the 'export' extra")

TWO = {
    "a": [Choice("low", 4.0, 1.0), Choice("high", 0.0, 3.0)],
    "b": [Choice("low", 3.0, 1.0), Choice("high", 0.0, 2.0)],
}


@pytest.mark.parametrize(
    ("budget", "formats"),
    [
        (2, {"a": "low", "b": "low"}),
        (3, {"a": "low", "b": "high"}),
        (4, {"a": "high", "b": "low"}),
        (5, {"a": "high", "b": "high"}),
        (99, {"a": "high", "b": "high"}),
    ],
)
def test_by_hand(budget: float, formats: dict[str, str]) -> None:
    assert allocate(TWO, budget) == formats


def test_of_equal_damage_the_cheaper() -> None:
    assert allocate({"a": [Choice("dear", 1.0, 9.0), Choice("cheap", 1.0, 2.0)]}, 10) == {"a": "cheap"}


def test_a_budget_below_the_least_names_the_least() -> None:
    with pytest.raises(OptionError, match=r"1\.5 bytes is below 2"):
        allocate(TWO, 1.5)


def test_nothing_to_allocate() -> None:
    assert allocate({}, 0) == {}


choices = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 1000)), min_size=1, max_size=4)


@given(groups=st.lists(choices, min_size=1, max_size=4), share=st.floats(0, 1), scale=st.sampled_from([1e-9, 1.0, 1e9]))
@settings(max_examples=40, deadline=None)
def test_equals_enumeration(groups: list[list[tuple[int, int]]], share: float, scale: float) -> None:
    options = {
        f"g{n}": [Choice(f"f{i}", damage * scale, cost * scale) for i, (damage, cost) in enumerate(rows)]
        for n, rows in enumerate(groups)
    }
    least = sum(min(c.cost for c in rows) for rows in options.values())
    most = sum(max(c.cost for c in rows) for rows in options.values())
    budget = least + share * (most - least)
    found = allocate(options, budget)
    picked = [next(c for c in options[g] if c.format == form) for g, form in found.items()]
    possible = [
        sum(c.damage for c in combination)
        for combination in itertools.product(*options.values())
        if sum(c.cost for c in combination) <= budget
    ]
    assert sum(c.cost for c in picked) <= budget
    assert sum(c.damage for c in picked) <= min(possible) + 1e-4 * scale * 1000
