"""Who gets which format: a multiple-choice knapsack over groups of matrices, solved exactly with scipy's HiGHS.

Knows costs and damages, nothing of models. Damage is additive over groups: each is what one group's errors alone do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fstq_infer.errors import MissingExtraError, OptionError

GAP = 1e-6  # relative distance to the optimum at which the solver may stop
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One format for one group. damage: predicted rise of the loss. cost: what the budget counts, bytes mostly."""

    format: str
    damage: float
    cost: float


def allocate(options: Mapping[str, Sequence[Choice]], budget: float, what: str = "bytes") -> dict[str, str]:
    """group -> format of least total damage whose costs stay within ``budget``; with equal damage the cheaper one.

    Raises OptionError when even the cheapest choices cost more, naming that cost; MissingExtraError without scipy.
    """
    if not options:
        return {}
    least = sum(min(choice.cost for choice in choices) for choices in options.values())
    if least > budget:
        raise OptionError(
            f"the budget of {budget:,.6g} {what} is below {least:,.6g}, the least that these formats allow; raise it, "
            "or allow formats of fewer bits"
        )
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MissingExtraError("allocating formats", error.name or "scipy", "export") from error
    options = {group: _undominated(choices) for group, choices in options.items()}
    flat = [(group, choice) for group, choices in options.items() for choice in choices]
    row = {group: number for number, group in enumerate(options)}
    damage = np.array([choice.damage for _, choice in flat])
    cost = np.array([choice.cost for _, choice in flat])
    one_each = csr_array(
        (np.ones(len(flat)), ([row[group] for group, _ in flat], range(len(flat)))), shape=(len(row), len(flat))
    )
    # Scaled to order one, so that the solver's absolute tolerances mean the same for every model and unit.
    largest = max(cost.max(), 1e-300)
    solved = milp(
        damage / max(damage.max(), 1e-300),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[None] / largest, -math.inf, budget / largest),
        ],
        # Presolve would print to standard output, under whatever is printed there, when a solution just misses a bound.
        options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
    )
    if solved.x is None:
        raise OptionError(f"no allocation was found ({solved.message}); set another budget")
    chosen = {group: choice for (group, choice), on in zip(flat, solved.x, strict=True) if on > 0.5}
    return {group: choice.format for group, choice in _fitting(options, chosen, budget).items()}


def _undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Choices, from cheap to dear, each of which does less damage than all cheaper ones."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.cost, one.damage)):
        if not found or choice.damage < found[-1].damage:
            found.append(choice)
    return found


def _fitting(options: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], budget: float) -> dict[str, Choice]:
    """The solver keeps constraints up to a tolerance; the budget is a promise: groups step down until it holds."""
    chosen = dict(chosen)
    while sum(choice.cost for choice in chosen.values()) > budget:
        steps = [
            ((other.damage - now.damage) / (now.cost - other.cost), group, other)
            for group, now in chosen.items()
            for other in options[group]
            if other.cost < now.cost
        ]
        _, group, other = min(steps, key=lambda step: step[:2])
        chosen[group] = other
    return chosen
