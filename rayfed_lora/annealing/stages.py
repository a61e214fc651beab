"""SA-FedLoRA's schedule: the stage of a round, what is trained, and at which rank.

Source: arXiv:2405.09394 v1 for the stages (initiating, then annealing by heating and cooling); the
formulas are this project's (docs/method.md), the paper's own are not public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rayfed_lora.annealing import acceptance, schedules
from rayfed_lora.errors import RunError
from rayfed_lora.plugins.calls import own_method
from rayfed_lora.plugins.tables import ACCEPTANCES, SHAPES
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.types import Proposal, RoundPlan, Stage


@dataclass(frozen=True)
class Feedback:
    """The server's measurements so far; the schedule's only input beside the recipe.

    Attributes:
        rank: uniform rank in use, None before the first adapter round.
        energy_current, energy_proposed: validation loss at the current rank and after the
            proposed truncation (metropolis).
        draw: uniform random number in [0, 1) of this round (metropolis).
        metric: newest validation metric (target).
        best_at_heating: best validation metric reached at the heating rank (target).
    """

    rank: int | None = None
    energy_current: float | None = None
    energy_proposed: float | None = None
    draw: float | None = None
    metric: float | None = None
    best_at_heating: float | None = None


def stage_lengths(annealing: Annealing) -> dict[Stage, int]:
    """Return the rounds of each stage, in order.

    Mode `full` makes all rounds initiating ones, mode `fixed` all rounds heating ones.
    """
    lengths: dict[Stage, int] = {
        "initiating": annealing.initiating_rounds,
        "heating": annealing.heating.rounds,
        "cooling": annealing.cooling.rounds,
        "holding": annealing.holding.rounds,
    }
    if annealing.mode == "staged":
        return lengths
    only = "initiating" if annealing.mode == "full" else "heating"
    return {stage: annealing.total_rounds * (stage == only) for stage in lengths}


def locate(annealing: Annealing, t: int) -> tuple[Stage, int]:
    """Return the stage of round `t` and the index inside it, from 0.

    Raises:
        ValueError: `t` is not a round of the schedule.
    """
    index = t
    for stage, length in stage_lengths(annealing).items():
        if 0 <= index < length:
            return stage, index
        index -= length
    raise ValueError(f"need a round in [0, {annealing.total_rounds}), got {t}")


def is_full(annealing: Annealing, t: int) -> bool:
    """Return whether round `t` trains and sends every weight."""
    stage, _ = locate(annealing, t)
    full = annealing.mode == "full" or annealing.initiating.trainable == "full"
    return stage == "initiating" and full


def adapter_rounds_before(annealing: Annealing, t: int) -> int:
    """Return the number of adapter rounds before round `t`; full-model rounds come first."""
    full = stage_lengths(annealing)["initiating"] if is_full(annealing, 0) else 0
    return max(t - full, 0)


def scheduled_rank(annealing: Annealing, t: int) -> int:
    """Return the uniform rank that the schedule gives round `t`, before any feedback.

    0 in a full-model round; the heating rank in an adapter initiating round. Holding keeps the rank
    of the last cooling round, which is `cooling.rank` for all shapes but `constant`.
    """
    stage, i = locate(annealing, t)
    high, low = annealing.heating.rank, annealing.cooling.rank
    if stage == "initiating":
        return 0 if is_full(annealing, t) else high
    if stage == "heating":
        if annealing.heating.shape == "hold" or annealing.mode == "fixed":
            return high
        return schedules.to_rank(schedules.ramp(low, high, annealing.heating.rounds)(i), low, high)
    if stage == "holding":
        return high if annealing.cooling.shape == "constant" else low
    settings = annealing.cooling
    value = schedules.cooling(settings.shape, high, low, settings.rounds, settings.options)
    with own_method("shape", settings.shape, t):
        found = float(value(i))
        if not math.isfinite(found):
            raise RunError(
                f"shape {settings.shape!r} in round {t + 1}: expected a finite number, got {found}"
            )
        return schedules.to_rank(found, high, low)


def ladder(annealing: Annealing) -> tuple[int, ...]:
    """Return the distinct ranks from the heating rank down that target acceptance steps on."""
    return _ladder(annealing, SHAPES.method(annealing.cooling.shape))


@lru_cache(maxsize=16)  # every round needs it, and it looks at all rounds
def _ladder(annealing: Annealing, shape: object) -> tuple[int, ...]:
    """Return the ladder under a shape: a notebook may give its name to another one."""
    del shape
    start = stage_lengths(annealing)["initiating"] + stage_lengths(annealing)["heating"]
    rounds = range(start, annealing.total_rounds)
    ranks = {annealing.heating.rank, *(scheduled_rank(annealing, t) for t in rounds)}
    return tuple(sorted(ranks, reverse=True))


def proposed_rank(annealing: Annealing, t: int, rank: int | None) -> int | None:
    """Return the scheduled rank of round `t` where it is below the current one, else None."""
    if is_full(annealing, t) or rank is None:
        return None
    scheduled = scheduled_rank(annealing, t)
    return scheduled if scheduled < rank else None


def temperature(annealing: Annealing, t: int) -> float:
    """Return the Metropolis temperature of round `t`, nats of loss."""
    stage, i = locate(annealing, t)
    before = {"cooling": i, "holding": annealing.cooling.rounds}.get(stage, 0)
    return acceptance.temperature(annealing.temperature, annealing.temperature_decay, before)


def plan_round(annealing: Annealing, t: int, feedback: Feedback) -> RoundPlan:
    """Return the plan of round `t`. Pure: the same feedback gives the same plan.

    Raises:
        ValueError: `t` is out of range, or the acceptance rule lacks its feedback.
    """
    stage, _ = locate(annealing, t)
    weight = annealing.initiating.proximal_weight if stage == "initiating" else 0.0
    if is_full(annealing, t):
        return RoundPlan(t, stage, "full", 0, weight, None)
    rank, proposal = _decide(annealing, t, feedback)
    return RoundPlan(t, stage, "adapter", rank, weight, proposal)


def schedule(annealing: Annealing) -> Iterator[RoundPlan]:
    """Yield the plan of every round, as if each proposal were accepted."""
    accepting = annealing.model_copy(update={"acceptance": "always"})
    rank = None
    for t in range(annealing.total_rounds):
        planned = plan_round(accepting, t, Feedback(rank=rank))
        rank = None if planned.trainable == "full" else planned.rank
        yield planned


def _decide(annealing: Annealing, t: int, feedback: Feedback) -> tuple[int, Proposal | None]:
    """Return the rank of an adapter round, and the proposal that decided it, if any."""
    stage, _ = locate(annealing, t)
    current, proposed = feedback.rank, proposed_rank(annealing, t, feedback.rank)
    watching = annealing.feedback == "metric" and stage in ("cooling", "holding")
    idle = not watching if annealing.feedback == "metric" else proposed is None
    if current is None or idle:
        return scheduled_rank(annealing, t), None
    settings, value = annealing.accepts, annealing.target.value
    offer = acceptance.Offer(
        round=t,
        stage=stage,
        rank=current,
        proposed=proposed,
        ladder=ladder(annealing),
        energy_current=feedback.energy_current,
        energy_proposed=feedback.energy_proposed,
        draw=feedback.draw,
        temperature=temperature(annealing, t),
        metric=feedback.metric,
        target=feedback.best_at_heating if value is None else value,
        tolerance=annealing.target.tolerance,
        higher_is_better=annealing.target.metric == "accuracy",
    )
    name = settings.name if annealing.mode == "staged" else "always"
    rule = ACCEPTANCES.with_options(name, settings.options)
    if ACCEPTANCES.method(name).built_in:
        found = rule.decide(offer)
    else:
        with own_method("acceptance", name, t):
            found = _proposal(rule.decide(offer), offer)
    if found is None or found.verdict == "rejected":
        return current, found
    return found.rank, found


def _proposal(rank: Any, offer: acceptance.Offer) -> Proposal | None:
    """Return the record of what an own rule returned; raise ValueError where that is no rank."""
    if isinstance(rank, Proposal):
        rank = offer.rank if rank.verdict == "rejected" else rank.rank
    low, high = min(offer.ladder), max(offer.ladder)
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not low <= rank <= high:
        raise ValueError(f"expected a rank from {low} to {high}, got {rank!r}")
    known = {
        "energy_current": offer.energy_current,
        "energy_proposed": offer.energy_proposed,
        "draw": offer.draw,
        "metric": offer.metric,
        "target": offer.target if offer.metric is not None else None,
    }
    if rank == offer.rank:
        lower = offer.proposed
        return None if lower is None else Proposal(lower, "rejected", **known)
    return Proposal(int(rank), "accepted" if rank < offer.rank else "reheated", **known)
