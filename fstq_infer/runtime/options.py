"""The options of a generation: the one place where what a caller wrote is checked. Knows no engine call."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from fstq_infer.errors import OptionError, suggestion
from fstq_infer.fisher.select import keep_count
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.sampling import Sampling

Keep = float | Sequence[float] | Literal["auto"]

MAX_TOKENS = 128
CURRENT = "the adapter that set_adapter chose"  # a default; no adapter can have that name
MILLION = 1_000_000
SAMPLING = tuple(item.name for item in fields(Sampling))
NAMES = ("keep", "max_tokens", "stop", "stream", *SAMPLING)


@dataclass(frozen=True, slots=True)
class Auto:
    """Adaptive keep: per prompt, as many tokens as hold the share ``mass`` of its score mass, 1e-6 <= mass < 1.

    Each stage keeps that share of what reached it. floor: prompts of so many tokens or fewer stay whole; calibration
    saw hardly any that short.
    """

    mass: float
    floor: int


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a call says nothing; a bundle's manifest gives all but ``max_tokens``.

    auto: what ``keep="auto"`` means; None where calibration found nothing to meet its contract.
    """

    keep: float | tuple[float, ...] = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    max_tokens: int = MAX_TOKENS
    auto: Auto | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Checked options of one call.

    ratios: keep ratio after each pruning stage, non-increasing, empty when dense. auto: instead of them, where given.
    """

    ratios: tuple[float, ...]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    auto: Auto | None = None

    def keep(self, tokens: int, stages: Sequence[Stage]) -> list[int]:
        """The engine's ``keep`` for a prompt of ``tokens`` > 0 new tokens."""
        if self.auto is None:
            return keep_counts(tokens, self.ratios, stages)
        return [tokens if tokens <= self.auto.floor else -round(self.auto.mass * MILLION)] * len(stages)


def parse_options(given: Mapping[str, Any], defaults: Defaults, stages: Sequence[Stage]) -> Options:
    """Check what a caller gave; None means the default.

    Raises OptionError for an unknown name (with a suggestion) or a value that is not accepted.
    """
    for name in given:
        if name not in NAMES:
            raise OptionError(f"there is no option {name!r}; {suggestion(name, NAMES, 'the options are')}")
    values = {name: value for name, value in given.items() if value is not None}
    max_tokens = values.get("max_tokens", defaults.max_tokens)
    if not isinstance(max_tokens, Integral) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise OptionError(f"max_tokens={max_tokens!r} is not accepted; expected a whole number >= 1")
    keep = values.get("keep", defaults.keep)
    auto = isinstance(keep, str) and keep == "auto"
    if auto and stages and defaults.auto is None:
        raise OptionError(
            "keep='auto' needs a share of the score mass that calibration chose, and this bundle has none. Give a "
            "ratio such as 0.5, or export the model again with more calibration items or a larger --max-quality-drop"
        )
    return Options(
        ratios=keep_ratios(1.0 if auto else keep, stages),
        max_tokens=int(max_tokens),
        stop=_stop(values.get("stop", ())),
        sampling=replace(defaults.sampling, **{name: values[name] for name in SAMPLING if name in values}),
        auto=defaults.auto if auto and stages else None,
    )


def keep_ratios(keep: Keep, stages: Sequence[Stage]) -> tuple[float, ...]:
    """One keep ratio per stage. A single number is the last stage's; earlier stages approach it geometrically."""
    if isinstance(keep, str):
        raise OptionError(f"keep={keep!r} is text; expected a ratio such as 0.5, 'auto', or None for the bundle's own")
    given: tuple[Any, ...] = tuple(keep) if isinstance(keep, Sequence) else (keep,)
    for ratio in given:
        if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 < float(ratio) <= 1:
            raise OptionError(f"keep={keep!r} is not accepted; expected ratios of the prompt's tokens, 0 < keep <= 1")
    ratios = tuple(map(float, given))
    if not stages:
        if any(ratio < 1 for ratio in ratios):
            raise OptionError(
                f"keep={keep!r} asks for token pruning, but this bundle has no pruning stage. Leave keep out, or "
                "export the model again with pruning (see --max-quality-drop in 'fstq export --help')"
            )
        return ()
    if not isinstance(keep, Sequence):
        return tuple(ratios[0] ** (stage / len(stages)) for stage in range(1, len(stages) + 1))
    if len(ratios) != len(stages):
        raise OptionError(f"keep={keep!r} has {len(ratios)} ratios; this bundle has {len(stages)} pruning stages")
    if any(later > earlier for earlier, later in itertools.pairwise(ratios)):
        raise OptionError(f"keep={keep!r} rises; a later stage cannot keep tokens that an earlier one dropped")
    return ratios


def keep_counts(tokens: int, ratios: Sequence[float], stages: Sequence[Stage]) -> list[int]:
    """How many of ``tokens`` > 0 new tokens stay after each stage: at least sink and window of it and later stages."""
    counts: list[int] = []
    least = 1
    for ratio, stage in zip(reversed(ratios), reversed(stages), strict=True):
        least = max(least, keep_count(tokens, ratio, stage.sink, stage.window))
        counts.append(least)
    return counts[::-1]


def _stop(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"stop={stop!r} is not accepted; expected a list of texts, none of them empty")
    return tuple(texts)
