"""Acceptance of a proposed lower rank.

Source: this project (docs/method.md, "Feedback"); the paper's own acceptance rule is not public.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

# 0.90 - 0.89 is above 0.01 in floating point; a metric at the tolerance still holds.
_ROUNDING = 1e-9

Verdict = Literal["accepted", "rejected", "reheated"]


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
