"""What a recipe accepts, and how it refuses the rest."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")

from fstq_export.recipe import Recipe

from fstq_infer.errors import OptionError


def test_one_stage_or_several() -> None:
    assert (Recipe().layers, Recipe().wanted) == ((), None)
    one = Recipe(prune_layer=2, keep=0.5)
    assert (one.layers, one.wanted) == ((2,), 0.5) == (Recipe([2], [0.5]).layers, Recipe([2], [0.5]).wanted)
    assert (Recipe([2, 4], [0.5, 0.25]).layers, Recipe([2, 4], [0.5, 0.25]).wanted) == ((2, 4), (0.5, 0.25))
    assert Recipe((2, 4), 0.25).wanted == 0.25
    assert Recipe((2, 4), (0.5, 0.5)).wanted == (0.5, 0.5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prune_layer": (4, 2)}, "prune-layer is 4,2; expected decoder layers that rise"),
        ({"prune_layer": (2, 2)}, "prune-layer is 2,2; expected decoder layers that rise"),
        ({"keep": 0.0}, "keep is 0; expected 'auto' or a ratio above 0"),
        ({"prune_layer": (1, 2), "keep": (1.5, 0.5)}, "keep is 1.5,0.5; expected"),
        ({"prune_layer": (1, 2), "keep": (float("nan"), 0.5)}, "keep is nan,0.5; expected"),
        ({"prune_layer": (1, 2), "keep": (0.25, 0.5)}, "keep is 0.25,0.5; expected ratios that do not rise"),
        ({"prune_layer": 2, "keep": (0.5, 0.25)}, "keep is 0.5,0.25, 2 ratios, with 1 prune layer; expected one"),
        ({"prune_layer": (1, 2, 3), "keep": (0.5, 0.25)}, "2 ratios, with 3 prune layers; expected one"),
        ({"keep": (0.5, 0.25)}, "2 ratios, with prune-layer 'auto'; expected one"),
        ({"max_quality_drop": -1}, "max-quality-drop is -1"),
        ({"score": "magic"}, "score is 'magic'; expected 'auto' or one of gate, embedding"),
        ({"window": 0}, "window 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Recipe(**given)


def test_prune_layers_must_be_the_models() -> None:
    Recipe((1, 3)).check_layers(4)
    Recipe().check_layers(4)
    for layers in ((0, 2), (2, 4)):
        with pytest.raises(
            OptionError, match=f"prune-layer is {layers[0]},{layers[1]}; this model has 4 decoder layers"
        ):
            Recipe(layers).check_layers(4)
