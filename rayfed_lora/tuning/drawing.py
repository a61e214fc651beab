"""A space in Ray Tune's terms: distributions, grids, mutations, searchers and schedulers.

Source: this project, on ray.tune.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from ray import tune
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
from rayfed_lora.tuning.space import Drawn, Space, trial_recipe, value_of

# The key of a trial's config that holds its draw.
DRAW = "draw"
# What a run may change between two rounds and still be the run that its rounds so far belong to.
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
# Keys of the schedule that a mode does not look at; shares of rounds have the same sum in each.
_UNSTAGED = (
    "annealing.initiating.rounds",
    "annealing.heating.rounds",
    "annealing.heating.shape",
    "annealing.cooling.",
    "annealing.holding.",
    "annealing.acceptance",
    "annealing.temperature",
    "annealing.target.",
)
_UNREAD: Mapping[str, tuple[str, ...]] = {
    "staged": (),
    "fixed": (*_UNSTAGED, "annealing.initiating."),
    "full": (*_UNSTAGED, "annealing.heating.", "annealing.allocation", "aggregation.rule"),
}
_TRIED = 200
_PERTURBATIONS = 5
_REDUCTION = 3


def param_space(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Return Tune's param_space: all trials draw under `DRAW`."""
    if space.search == "grid":
        return {DRAW: tune.grid_search(grid(space, recipe))}
    return {DRAW: {key: _domain(how) for key, how in space.drawn.items()}}


def _domain(how: Drawn) -> Any:
    if how.uniform is not None:
        return tune.uniform(*how.uniform)
    if how.loguniform is not None:
        return tune.loguniform(*how.loguniform)
    if how.randint is not None:
        return tune.randint(how.randint[0], how.randint[1] + 1)
    return tune.choice(how.choice)


def grid(space: Space, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the draws of a grid, one for each recipe that they stand for."""
    columns = [
        how.choice if how.randint is None else range(how.randint[0], how.randint[1] + 1)
        for how in space.drawn.values()
    ]
    draws = [
        dict(zip(space.drawn, values, strict=True))
        for values in itertools.product(*(column or () for column in columns))
    ]
    return list({json.dumps(space.settings(draw, recipe)): draw for draw in draws}.values())


def check(space: Space, recipe: Recipe) -> int:
    """Try draws of the space without running them.

    Returns:
        How many of a thousand draws are refused; 0 is what a good space has.

    Raises:
        BadInputError: all are, with the reason of the first.
    """
    tried = refused = 0
    first: BadInputError | None = None
    for draw in _trial_draws(space, recipe):
        tried += 1
        try:
            trial_recipe(space, recipe, draw)
        except BadInputError as error:
            refused, first = refused + 1, first or error
    if first is not None and refused == tried:
        raise BadInputError(f"search space: no draw of it is a recipe that can run; e.g. {first}")
    return round(1000 * refused / tried)


def without_effect(space: Space, recipe: Recipe) -> list[str]:
    """Return the drawn keys that no trial, or no run in the recipe's mode, looks at."""
    never = [key for key, how in space.drawn.items() if _never(space, recipe, how)]
    if "method" in space.drawn or "annealing.mode" in space.drawn:
        return never
    unread = _UNREAD[recipe.annealing.mode]
    return [key for key in space.drawn if key.startswith(unread) or key in never]


def _never(space: Space, recipe: Recipe, how: Drawn) -> bool:
    """Return whether a value is drawn for a condition that no draw fulfils."""
    for key, wanted in how.when.items():
        other = space.drawn.get(key)
        known = [value_of(recipe, key)] if other is None else other.choice
        if known is not None and wanted not in known:
            return True
    return False


def _trial_draws(space: Space, recipe: Recipe) -> Iterator[Mapping[str, Any]]:
    if space.search == "grid":
        yield from grid(space, recipe)
        return
    random = np.random.RandomState(recipe.seed)
    domains = {key: _domain(how) for key, how in space.drawn.items()}
    for _ in range(_TRIED):
        yield {key: domain.sample(random_state=random) for key, domain in domains.items()}


def searcher(space: Space, recipe: Recipe, max_concurrent: int) -> SearchAlgorithm | Searcher:
    """Return what draws the values, seeded by the recipe's seed.

    Args:
        space: what is drawn.
        recipe: what is not.
        max_concurrent: most trials at once; a population is drawn as a whole, and takes turns.

    Raises:
        BadInputError: optuna is asked for and not installed.
    """
    if space.search != "optuna":
        limit = 0 if space.scheduler == "pbt" else max_concurrent
        return BasicVariantGenerator(max_concurrent=limit, random_state=recipe.seed)
    try:
        from ray.tune.search.optuna import OptunaSearch

        names, modes = list(space.objectives), list(space.objectives.values())
        single = len(names) == 1
        found = OptunaSearch(
            metric=names[0] if single else names,
            mode=modes[0] if single else modes,
            seed=recipe.seed,
        )
    except (ImportError, AssertionError):
        raise BadInputError(
            "--search optuna: expected the package optuna; pip install optuna"
        ) from (None)
    return ConcurrencyLimiter(found, max_concurrent)


def scheduler(space: Space, recipe: Recipe) -> TrialScheduler | None:
    """Return what ends or changes trials by the first objective; None where nothing does.

    Raises:
        BadInputError: pbt, and ranks are drawn under a rule by which clients keep factors.
    """
    metric, mode = next(iter(space.objectives.items()))
    total = recipe.annealing.total_rounds
    ranks = [key for key in space.drawn if key.startswith(_RANKS)]
    if space.scheduler == "pbt" and ranks and RULES[recipe.aggregation.rule].personal:
        raise BadInputError(
            f"--scheduler pbt: expected no {ranks[0]} in the space, since clients keep factors of"
            f" their own under rule {recipe.aggregation.rule!r}, at the rank that they have"
        )
    watched: dict[str, Any] = {"time_attr": "round", "metric": metric, "mode": mode}
    grace = math.ceil(total / 4)
    if space.scheduler == "asha":
        return ASHAScheduler(
            max_t=_most_rounds(space, recipe),
            grace_period=grace,
            reduction_factor=_REDUCTION,
            **watched,
        )
    if space.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, **watched)
    if space.scheduler == "none":
        return None
    return PopulationBasedTraining(
        perturbation_interval=max(1, total // _PERTURBATIONS),
        hyperparam_mutations={DRAW: mutations(space)},
        custom_explore_fn=within(space),
        # Ray's synchronous mode waits for ever for a trial that has failed.
        synch=False,
        **watched,
    )


def _most_rounds(space: Space, recipe: Recipe) -> int:
    """Return the rounds of the longest run that the space is known to draw."""
    lengths = [recipe.annealing.total_rounds]
    for draw in _trial_draws(space, recipe):
        with suppress(BadInputError):
            lengths.append(trial_recipe(space, recipe, draw).annealing.total_rounds)
    return max(lengths)


def mutations(space: Space) -> dict[str, Any]:
    """Return what population based training may change while a run goes on.

    Raises:
        BadInputError: the space draws nothing of the kind.
    """
    found = {
        key: how.choice if how.choice is not None else _domain(how)
        for key, how in space.drawn.items()
        if key.startswith(_CHANGEABLE)
    }
    if not found:
        raise BadInputError(
            "--scheduler pbt: expected a space with a key that can change while a run goes on"
            f" ({', '.join(_CHANGEABLE)})"
        )
    return found


def within(space: Space) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return what puts perturbed values back into the limits they are drawn from."""
    limits = {key: how.limits for key, how in space.drawn.items() if how.limits is not None}

    def clipped(config: dict[str, Any]) -> dict[str, Any]:
        draw = dict(config[DRAW])
        for key, (low, high) in limits.items():
            draw[key] = min(max(draw[key], low), high)
        return {**config, DRAW: draw}

    return clipped
