"""What formats were asked for: a name, a plan to follow, or a budget. Knows the options, no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fstq_infer.errors import OptionError
from fstq_infer.quant.formats import named
from fstq_infer.quant.latency import Costs, Target, costs_on
from fstq_infer.quant.plan import Plan

AUTO = "auto"
SHORT = {"int4": "int4-32"}  # names that stand for one of several formats
MOST_STEPS = 100_000


@dataclass(frozen=True, slots=True)
class Precision:
    """What was asked for. format: 'auto', a format's name, or None for no plan; plan: one to follow, and its path.

    bits: effective bits per weight, scales counted; bytes: of all weights; latency: of a call. At most one of them,
    with 'auto' only. profile: what a device takes. tune: steps that train codes; None: by the model's size.
    """

    format: str | None = None
    bits: float | None = None
    bytes: int | None = None
    plan: Plan | None = None
    place: str = ""
    tune: int | None = None
    latency: Target | None = None
    profile: Costs | None = None

    def __post_init__(self) -> None:
        if sum(budget is not None for budget in (self.bits, self.bytes, self.latency)) > 1:
            raise OptionError("--bits, --bytes and --target-latency are ways to set one budget; give one of them")
        if self.tune is not None and not 0 <= self.tune <= MOST_STEPS:
            raise OptionError(f"tune-codes is {self.tune}; expected 0 to {MOST_STEPS} steps, such as 500")
        if self.profile is not None and not self.wanted:
            raise OptionError(
                "--profile says what formats take on a device; give --target-latency or --precision as well"
            )
        if self.tune and not self.wanted:
            raise OptionError("--tune-codes trains the codes of formats; give --precision as well")
        if self.bits is not None and not 1 <= self.bits <= 32:
            raise OptionError(f"bits is {self.bits}; expected 1 to 32 bits per weight, such as 4.8")
        if self.bytes is not None and self.bytes < 1:
            raise OptionError(f"bytes is {self.bytes}; expected a number of bytes above 0")
        if self.format is not None and self.format != AUTO:
            named(self.format, "precision")
        if self.budgeted and self.format != AUTO:
            raise OptionError(
                "--bits, --bytes and --target-latency set the budget of --precision auto; leave the other precision out"
            )

    @property
    def budgeted(self) -> bool:
        """Whether a budget was given."""
        return self.bits is not None or self.bytes is not None or self.latency is not None

    @classmethod
    def parse(
        cls,
        precision: str | None,
        bits: float | None,
        size: int | None,
        latency: str | None = None,
        profile: str | None = None,
        tune: int | None = None,
    ) -> Precision:
        """From the command line: a format, 'auto' or the path of a plan; a budget alone means 'auto'.

        latency: as :meth:`Target.parse` has it. profile: a board or a file, see :func:`costs_on`.
        """
        target = None if latency is None else Target.parse(latency)
        device = None if profile is None else costs_on(profile)
        budget = bits is not None or size is not None or target is not None
        if precision is None:
            return cls(AUTO if budget else None, bits, size, tune=tune, latency=target, profile=device)
        if not precision.lower().endswith(".toml"):
            return cls(SHORT.get(precision, precision), bits, size, tune=tune, latency=target, profile=device)
        if budget:
            raise OptionError("a budget has no meaning beside a plan, which names every format")
        try:
            data = Path(precision).read_bytes()
        except OSError as error:
            raise OptionError(f"the plan {precision} cannot be read: {error}; check the path") from error
        return cls(None, None, None, Plan.from_toml(data, precision), precision, tune, None, device)

    @property
    def wanted(self) -> bool:
        """Whether weights get formats at all."""
        return self.format is not None or self.plan is not None
