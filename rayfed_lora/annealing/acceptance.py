"""Acceptance of a proposed lower rank: rules by name, registered by `acceptance`.

Source: this project (docs/method.md, "Feedback"); the paper's own acceptance rule is not public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rayfed_lora.plugins.tables import ACCEPTANCES
from rayfed_lora.types import Proposal, Stage

# 0.90 - 0.89 is above 0.01 in floating point; a metric at the tolerance still holds.
_ROUNDING = 1e-9

Needs = Literal["nothing", "energies", "metric"]


@dataclass(frozen=True)
class Offer:
    """What an acceptance rule decides on; None: not asked for, or not known.

    Attributes:
        round: index from 0.
        stage: of the round.
        rank: uniform rank in use.
        proposed: the scheduled rank, where it is lower.
        ladder: the ranks of the schedule from the heating rank down.
        energy_current, energy_proposed: validation loss at the rank in use, and after the proposed
            cut, nats (needs energies).
        draw: uniform random number in [0, 1) of this round (needs energies).
        temperature: of this round, nats.
        metric: newest value of `annealing.target.metric` on the validation split (needs metric).
        target: value to hold: `annealing.target.value`, or the best one at the heating rank.
        tolerance: how far short of the target still counts as held.
        higher_is_better: whether of the metric.
    """

    round: int
    stage: Stage
    rank: int
    proposed: int | None
    ladder: tuple[int, ...]
    energy_current: float | None = None
    energy_proposed: float | None = None
    draw: float | None = None
    temperature: float = 0.0
    metric: float | None = None
    target: float | None = None
    tolerance: float = 0.0
    higher_is_better: bool = True


@dataclass(frozen=True)
class Acceptance:
    """A registered acceptance rule: what it needs to know, and its function."""

    needs: Needs
    decide: Callable[..., Any]


def acceptance(name: str | None = None, *, needs: Needs = "nothing") -> Callable[[Any], Any]:
    """Register an acceptance rule: a function of an `Offer` that returns the rank of the round.

    That is a whole number between the ends of the schedule. It is asked in the adapter rounds whose
    scheduled rank is lower than the one in use; one that needs a metric in each round of cooling
    and holding. Keyword-only parameters are its options: keys beside `annealing.acceptance.name`.

    Args:
        name: value of `annealing.acceptance`; default: the function's, with hyphens.
        needs: what the server measures for it on the validation split: nothing, the losses before
            and after the proposed cut (energies), or the metric of `annealing.target`.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """

    def bound(value: Acceptance, options: Mapping[str, Any]) -> Acceptance:
        return Acceptance(value.needs, partial(value.decide, **options))

    def register(function: Any) -> Any:
        made = Acceptance(needs, function)
        return ACCEPTANCES.add(function, name, value=lambda _: made, bind=bound)

    return register


def temperature(first: float, decay: float, cooling_rounds: int) -> float:
    """Return tau = first * decay ** cooling_rounds, nats of loss.

    `first` > 0 is the temperature of the first cooling round, and `decay` in (0, 1] the factor for
    each of the `cooling_rounds` before this one.

    >>> temperature(0.1, 0.5, 2)
    0.025
    """
    return first * decay**cooling_rounds


def metropolis_probability(current: float, proposed: float, tau: float) -> float:
    """Return min(1, exp(-(proposed - current) / tau)); 0 where that is not a number.

    `current` and `proposed` are validation losses (energies), `tau` >= 0 is a temperature, in nats.

    Source: Metropolis et al. 1953, J. Chem. Phys. 21:1087.

    >>> metropolis_probability(1.0, 0.9, 0.1)
    1.0
    >>> round(metropolis_probability(1.0, 1.1, 0.1), 6)
    0.367879
    """
    if not math.isfinite(proposed) or math.isnan(current):
        return 0.0
    rise = proposed - current
    return 1.0 if rise <= 0 else math.exp(-rise / max(tau, math.ulp(0.0)))


def target_holds(metric: float, value: float, tolerance: float, higher_is_better: bool) -> bool:
    """Return whether `metric` is within `tolerance` of `value`, or better than it.

    False for a metric that is not finite.

    >>> target_holds(0.90, 0.905, 0.01, higher_is_better=True)
    True
    """
    if not math.isfinite(metric):
        return False
    short = value - metric if higher_is_better else metric - value
    return short <= tolerance + _ROUNDING


def step_rank(ladder: Sequence[int], current: int, down: bool) -> int:
    """Return the next rank on the ladder below (or above) `current`, `current` at its end.

    >>> step_rank([16, 8, 4], 8, down=True), step_rank([16, 8, 4], 8, down=False)
    (4, 16)
    >>> step_rank([16, 8, 4], 4, down=True)
    4
    """
    if down:
        return max((r for r in ladder if r < current), default=current)
    return min((r for r in ladder if r > current), default=current)


@acceptance()
def always(offer: Offer) -> Proposal:
    """Accept each proposed rank."""
    return Proposal(_proposed(offer), "accepted")


@acceptance(needs="energies")
def metropolis(offer: Offer) -> Proposal:
    """Accept a rank by Metropolis' rule on the validation loss (J. Chem. Phys. 21:1087)."""
    e0, e1, draw = offer.energy_current, offer.energy_proposed, offer.draw
    if e0 is None or e1 is None or draw is None:
        raise ValueError(f"metropolis needs both energies and a draw, got {offer}")
    probability = metropolis_probability(e0, e1, offer.temperature)
    return Proposal(
        rank=_proposed(offer),
        verdict="accepted" if draw < probability else "rejected",
        energy_current=e0,
        energy_proposed=e1,
        temperature=offer.temperature,
        probability=probability,
        draw=draw,
    )


@acceptance(needs="metric")
def target(offer: Offer) -> Proposal | None:
    """Go one step down while a target holds, one up where it does not."""
    metric, value = offer.metric, offer.target
    if metric is None or value is None:
        raise ValueError(f"target acceptance needs a metric and its best, got {offer}")
    holds = target_holds(metric, value, offer.tolerance, offer.higher_is_better)
    rank = step_rank(offer.ladder, offer.rank, down=holds)
    if rank == offer.rank:
        return None
    return Proposal(rank, "accepted" if holds else "reheated", metric=metric, target=value)


def _proposed(offer: Offer) -> int:
    if offer.proposed is None:
        raise ValueError(f"expected a proposed rank, got {offer}")
    return offer.proposed
