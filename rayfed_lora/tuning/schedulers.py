"""Ray Tune's searchers and schedulers for a search space. Source: this project, on ray.tune."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tuning.distributions import DRAW, domain, samples
from rayfed_lora.tuning.draws import trial_recipe
from rayfed_lora.tuning.space import Space

# Prefixes of keys that may change between two rounds of one run.
_CHANGEABLE = (
    "annealing.heating.",
    "annealing.cooling.",
    "annealing.holding.",
    "annealing.temperature",
    "clients.optimizer.",
    "clients.lr_schedule.",
    "clients.local_steps",
    "clients.max_grad_norm",
    "aggregation.server_optimizer.lr",
)
_RANKS = ("annealing.heating.rank", "annealing.cooling.rank")
_PERTURBATIONS = 5
_REDUCTION = 3


def searcher(space: Space, recipe: Recipe, max_concurrent: int) -> SearchAlgorithm | Searcher:
    """Return the search algorithm, seeded by the recipe's seed.

    `max_concurrent` is ignored with pbt, which draws the whole population at once and lets its
    trials take turns.

    Raises:
        BadInputError: optuna is not installed.
    """
    if space.search != "optuna":
        limit = 0 if space.scheduler == "pbt" else max_concurrent
        return BasicVariantGenerator(max_concurrent=limit, random_state=recipe.seed)
    try:
        from ray.tune.search.optuna import OptunaSearch

        names, modes = list(space.objectives), list(space.objectives.values())
        metric, mode = (names, modes) if len(names) > 1 else (names[0], modes[0])
        found = OptunaSearch(metric=metric, mode=mode, seed=recipe.seed)
    except (ImportError, AssertionError):
        raise BadInputError(
            "--search optuna: expected the package optuna; pip install optuna"
        ) from None
    return ConcurrencyLimiter(found, max_concurrent)


def scheduler(space: Space, recipe: Recipe) -> TrialScheduler | None:
    """Return the scheduler of trials by the first objective, or None.

    Raises:
        BadInputError: pbt would change ranks of factors that clients keep, or nothing at all.
    """
    metric, mode = next(iter(space.objectives.items()))
    watched: dict[str, Any] = {"time_attr": "round", "metric": metric, "mode": mode}
    total = recipe.annealing.total_rounds
    grace = math.ceil(total / 4)
    if space.scheduler == "none":
        return None
    if space.scheduler == "asha":
        most = _most_rounds(space, recipe)
        return ASHAScheduler(max_t=most, grace_period=grace, reduction_factor=_REDUCTION, **watched)
    if space.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, **watched)
    ranks = [key for key in space.drawn if key.startswith(_RANKS)]
    if ranks and RULES[recipe.aggregation.rule].personal:
        raise BadInputError(
            f"--scheduler pbt: expected no {ranks[0]} in the space, since clients keep their own"
            f" factors, at a fixed rank, under rule {recipe.aggregation.rule!r}"
        )
    return PopulationBasedTraining(
        perturbation_interval=max(1, total // _PERTURBATIONS),
        hyperparam_mutations={DRAW: mutations(space)},
        custom_explore_fn=clipping(space),
        # Ray's synchronous mode waits forever for a failed trial.
        synch=False,
        **watched,
    )


def _most_rounds(space: Space, recipe: Recipe) -> int:
    """Return the number of rounds of the longest run among the recipe and `samples`."""
    lengths = [recipe.annealing.total_rounds]
    for draw in samples(space, recipe):
        with suppress(BadInputError):
            lengths.append(trial_recipe(space, recipe, draw).annealing.total_rounds)
    return max(lengths)


def mutations(space: Space) -> dict[str, Any]:
    """Return what pbt may change during a run, by key; BadInputError if there is nothing."""
    found = {
        key: how.choice or domain(how)
        for key, how in space.drawn.items()
        if key.startswith(_CHANGEABLE)
    }
    if not found:
        raise BadInputError(
            "--scheduler pbt: expected a space with a key that can change during a run"
            f" ({', '.join(_CHANGEABLE)})"
        )
    return found


def clipping(space: Space) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that clips a config's perturbed values to the limits of the space."""
    limits = {key: how.limits for key, how in space.drawn.items() if how.limits is not None}

    def clipped(config: dict[str, Any]) -> dict[str, Any]:
        draw = dict(config[DRAW])
        for key, (low, high) in limits.items():
            draw[key] = min(max(draw[key], low), high)
        return {**config, DRAW: draw}

    return clipped
