"""The local learning rate of a round."""

from __future__ import annotations

import math

from rayfed_lora.annealing.stages import is_full, locate
from rayfed_lora.recipe.clients import LrSchedule, Spread
from rayfed_lora.recipe.recipe import Recipe


def factor(schedule: LrSchedule, t: int, rounds: int) -> float:
    """Return the factor on the learning rate in round `t` of `rounds`.

    Warm-up: (t + 1) / (warmup_rounds + 1). After it, with u from 0 in the first round to 1 in the
    last, or in round `horizon` and after it: linear 1 + (f - 1) u, cosine
    f + (1 - f) (1 + cos(pi u)) / 2, f = `final_factor`.

    >>> schedule = LrSchedule(shape="linear", final_factor=0.5)
    >>> [factor(schedule, t, 3) for t in range(3)]
    [1.0, 0.75, 0.5]
    """
    warmup, final = schedule.warmup_rounds, schedule.final_factor
    if t < warmup:
        return (t + 1) / (warmup + 1)
    last = (schedule.horizon or rounds) - 1
    u = min((t - warmup) / max(last - warmup, 1), 1.0)
    if schedule.shape == "linear":
        return 1.0 + (final - 1.0) * u
    if schedule.shape == "cosine":
        return final + (1.0 - final) * (1.0 + math.cos(math.pi * u)) / 2.0
    return 1.0


def learning_rate(recipe: Recipe, t: int, usual: float | None = None) -> float:
    """Return the local learning rate of round `t`: the stage's own times the schedule's factor.

    Args:
        recipe: the run.
        t: index of the round.
        usual: a client's own rate; None: the recipe's.

    Raises:
        ValueError: the rate differs between clients, and no client's is given.
    """
    stage, _ = locate(recipe.annealing, t)
    lr = recipe.annealing.initiating.lr if stage == "initiating" else None
    if lr is None:
        given = recipe.clients.optimizer.lr if usual is None else usual
        if isinstance(given, Spread):
            raise ValueError("need a client's learning rate: they differ")
        lr = given
    return lr * factor(recipe.clients.lr_schedule, t, recipe.annealing.total_rounds)


def rate_warning(recipe: Recipe) -> str | None:
    """Return a warning if full-model rounds get a learning rate that was chosen for factors.

    With adamw and pre-trained weights the best rate of factors was three to thirty times that of
    the full model, at which the latter does not learn (source: this project, results/paper).
    """
    annealing = recipe.annealing
    full = annealing.mode == "staged" and is_full(annealing, 0)
    own = recipe.model.source == "config" or annealing.initiating.lr is not None
    if not full or own or recipe.clients.optimizer.name != "adamw":
        return None
    lr = recipe.clients.optimizer.lr
    rate = "each client's own" if isinstance(lr, Spread) else f"{lr:g}"
    return (
        "full-model rounds (and FedAvg, in a comparison) train at the rate of the factors,"
        f" clients.optimizer.lr ({rate}): pre-trained weights mostly need"
        " a smaller one, annealing.initiating.lr"
    )
