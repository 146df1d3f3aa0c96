"""What the user asked of calibration and pruning, checked as far as it can be without a model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fstq_infer.errors import OptionError
from fstq_infer.fisher.scores import TARGETS


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of an export's pruning.

    prune_layer, keep: None for automatic choice; lists for several stages, where each ratio is the share of the prompt
    that stays after its stage. One ratio for several stages is the last one's, and earlier ones approach it
    geometrically, as at run time. max_quality_drop: fraction of dense quality. score: the sensitivity that the probe
    learns; 'auto' tries each and keeps what measures best. window: None for 4 last tokens that stay, and without
    calibration as many as the probe reads.
    """

    prune_layer: int | Sequence[int] | None = None
    keep: float | Sequence[float] | None = None
    max_quality_drop: float = 0.01
    score: str = "auto"
    sink: int = 1
    window: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        layers, ratios = self.layers, _tuple(self.keep)
        if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
            raise OptionError(f"prune-layer is {_shown(layers)}; expected decoder layers that rise, such as 2,4")
        for ratio in ratios:
            if not 0 < ratio <= 1:
                raise OptionError(f"keep is {_shown(ratios)}; expected 'auto' or a ratio above 0 and at most 1")
        if len(ratios) > 1 and len(ratios) != len(layers):
            stages = f"{len(layers)} prune layer{'s'[: len(layers) != 1]}" if layers else "prune-layer 'auto'"
            found = f"keep is {_shown(ratios)}, {len(ratios)} ratios, with {stages}"
            raise OptionError(f"{found}; expected one ratio, or one for each layer that prune-layer names")
        if any(later > earlier for earlier, later in itertools.pairwise(ratios)):
            raise OptionError(
                f"keep is {_shown(ratios)}; expected ratios that do not rise: each is the share of the whole prompt "
                "that stays after its stage, and no later stage brings tokens back"
            )
        if not 0 <= self.max_quality_drop < 1:
            found = f"max-quality-drop is {self.max_quality_drop}"
            raise OptionError(f"{found}; expected a fraction from 0 to below 1, such as 0.01")
        if self.score not in ("auto", *TARGETS):
            raise OptionError(f"score is '{self.score}'; expected 'auto' or one of {', '.join(TARGETS)}")
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"seed is {self.seed}; expected a whole number from 0 to 4294967295")
        if self.sink < 0 or (self.window is not None and self.window < 1):
            raise OptionError(f"sink is {self.sink} and window {self.window}; expected sink >= 0 and window >= 1")

    @property
    def layers(self) -> tuple[int, ...]:
        """The prune layers that were named; empty for automatic choice."""
        return _tuple(self.prune_layer)

    @property
    def wanted(self) -> float | tuple[float, ...] | None:
        """The keep ratio that was named, as the runtime takes it: a list only where there is one for each stage."""
        ratios = _tuple(self.keep)
        return ratios if len(ratios) > 1 else ratios[0] if ratios else None

    def check_layers(self, layers: int) -> None:
        """Raises OptionError where a named prune layer does not suit a model of so many decoder layers."""
        if any(not 0 < layer < layers for layer in self.layers):
            found = f"prune-layer is {_shown(self.layers)}; this model has {layers} decoder layers"
            raise OptionError(f"{found}, expected 1 to {layers - 1} or 'auto'")


def _tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, Sequence) else (value,)


def _shown(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
