"""More rounds on a run: a longer schedule whose past is the one that was run.

Source: this project (docs/reference.md, "More rounds, and a start from an adapter").
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rayfed_lora.annealing.stages import is_full, ladder, locate, scheduled_rank, temperature
from rayfed_lora.errors import RunFolderError
from rayfed_lora.federation.learning_rate import learning_rate
from rayfed_lora.recipe.clients import Spread
from rayfed_lora.recipe.recipe import Recipe

# What a schedule may be lengthened by.
_KEYS = frozenset(
    {
        "annealing.initiating.rounds",
        "annealing.heating.rounds",
        "annealing.cooling.rounds",
        "annealing.holding.rounds",
        "clients.lr_schedule.horizon",
    }
)
_REMEDY = "lengthen the last stage, such as --set annealing.holding.rounds=N"
_RATES = (
    "the learning rate runs over all rounds: --set clients.lr_schedule.horizon={} keeps that of the"
    " rounds that were run"
)


def is_lengthened(changed: Collection[str]) -> bool:
    """Return whether two recipes differ in the lengths of their schedules alone."""
    return bool(changed) and set(changed) <= _KEYS


def check_past(where: str, kept: Recipe, recipe: Recipe, rounds: int) -> None:
    """Check that the first `rounds` rounds of two schedules are the same.

    Args:
        where: begins the message.
        kept: of the run.
        recipe: with another length.
        rounds: that the run has finished.

    Raises:
        RunFolderError: they differ, with the first round that does, or the schedule is shorter.
    """
    total = recipe.annealing.total_rounds
    if total < rounds:
        raise RunFolderError(
            f"{where} with {rounds} rounds; expected a schedule of at least as many, got {total}"
        )
    for t in range(rounds):
        before, now = _planned(kept, t), _planned(recipe, t)
        if before != now:
            raise RunFolderError(
                f"{where} whose round {t + 1} was {_told(before)}, it would be {_told(now)};"
                f" {_REMEDY}"
            )
        had, would_have = _rate(kept, t), _rate(recipe, t)
        if had != would_have:
            horizon = kept.clients.lr_schedule.horizon or kept.annealing.total_rounds
            raise RunFolderError(
                f"{where} whose round {t + 1} had learning rate {had:g}, it would"
                f" have {would_have:g}{_whose(kept)}; {_RATES.format(horizon)}"
            )
    steps = kept.annealing.mode == "staged" and kept.annealing.accepts.name != "always"
    if rounds > 0 and steps and ladder(kept.annealing) != ladder(recipe.annealing):
        raise RunFolderError(
            f"{where} whose acceptance steps on the ranks {_ranks(kept)}, they would be"
            f" {_ranks(recipe)}; {_REMEDY}"
        )


def _planned(recipe: Recipe, t: int) -> tuple[Any, ...]:
    """Return what the schedule says of round `t`, all but the learning rate."""
    annealing = recipe.annealing
    stage, i = locate(annealing, t)
    rank = None if is_full(annealing, t) else scheduled_rank(annealing, t)
    heat = temperature(annealing, t) if annealing.feedback == "energies" else None
    return stage, i, rank, heat


def _rate(recipe: Recipe, t: int) -> float:
    """Return the learning rate of round `t`; of a client whose own is 1, where they have theirs."""
    return learning_rate(recipe, t, 1.0 if _own_rates(recipe) else None)


def _own_rates(recipe: Recipe) -> bool:
    return isinstance(recipe.clients.optimizer.lr, Spread)


def _whose(recipe: Recipe) -> str:
    return " (of a client whose own is 1)" if _own_rates(recipe) else ""


def _told(planned: tuple[Any, ...]) -> str:
    stage, i, rank, _ = planned
    return f"round {i + 1} of {stage}, " + ("the full model" if rank is None else f"rank {rank}")


def _ranks(recipe: Recipe) -> str:
    return ", ".join(map(str, ladder(recipe.annealing)))
