"""A space's distributions in Ray Tune, samples of them, and checks on samples. Source: ray.tune."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray import tune

from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tuning.draws import recipe_values, trial_recipe, value_of
from rayfed_lora.tuning.space import Drawn, Space

# The key of a trial's config that holds its draw.
DRAW = "draw"
_SAMPLES = 200
# Schedule keys that a mode ignores.
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
_IGNORED: Mapping[str, tuple[str, ...]] = {
    "staged": (),
    "fixed": (*_UNSTAGED, "annealing.initiating."),
    "full": (*_UNSTAGED, "annealing.heating.", "annealing.allocation", "aggregation.rule"),
}


def param_space(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Return Tune's param_space, with all distributions under `DRAW`."""
    if space.search == "grid":
        return {DRAW: tune.grid_search(grid(space, recipe))}
    return {DRAW: {key: domain(how) for key, how in space.drawn.items()}}


def domain(how: Drawn) -> Any:
    """Return Tune's search domain of a distribution."""
    if how.uniform is not None:
        return tune.uniform(*how.uniform)
    if how.loguniform is not None:
        return tune.loguniform(*how.loguniform)
    if how.randint is not None:
        return tune.randint(how.randint[0], how.randint[1] + 1)
    return tune.choice(how.choice)


def grid(space: Space, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the draws of a grid, one for each distinct recipe."""
    columns = [
        range(how.randint[0], how.randint[1] + 1) if how.randint else how.choice or ()
        for how in space.drawn.values()
    ]
    draws = [dict(zip(space.drawn, row, strict=True)) for row in itertools.product(*columns)]
    return list({json.dumps(recipe_values(space, d, recipe)): d for d in draws}.values())


def samples(space: Space, recipe: Recipe) -> Iterator[Mapping[str, Any]]:
    """Yield all draws of a grid, and of other spaces 200 seeded by the recipe's seed."""
    if space.search == "grid":
        yield from grid(space, recipe)
        return
    random = np.random.RandomState(recipe.seed)
    domains = {key: domain(how) for key, how in space.drawn.items()}
    for _ in range(_SAMPLES):
        yield {key: values.sample(random_state=random) for key, values in domains.items()}


def invalid_draws(space: Space, recipe: Recipe) -> int:
    """Return how many of a thousand draws are not valid recipes; BadInputError if none is."""
    faults: list[BadInputError] = []
    tried = list(samples(space, recipe))
    for draw in tried:
        try:
            trial_recipe(space, recipe, draw)
        except BadInputError as error:
            faults.append(error)
    if len(faults) == len(tried):
        raise BadInputError(f"search space: no draw is a valid recipe; e.g. {faults[0]}")
    return round(1000 * len(faults) / len(tried))


def without_effect(space: Space, recipe: Recipe) -> list[str]:
    """Return the drawn keys that the recipe's mode ignores or whose condition is never met."""
    ignored = _IGNORED[recipe.annealing.mode]
    if "method" in space.drawn or "annealing.mode" in space.drawn:
        ignored = ()
    return [
        key
        for key, how in space.drawn.items()
        if key.startswith(ignored) or _never_met(space, recipe, how)
    ]


def _never_met(space: Space, recipe: Recipe, how: Drawn) -> bool:
    """Return whether a key of the condition never has the value that it must have."""
    fixed = {key: [value_of(recipe, key)] for key in how.when if key not in space.drawn}
    possible = {key: other.choice for key, other in space.drawn.items()} | fixed
    return any(wanted not in (possible[key] or [wanted]) for key, wanted in how.when.items())
