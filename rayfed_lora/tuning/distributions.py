"""A space's distributions in Ray Tune, and draws from them. Source: ray.tune."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray import tune

from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tuning.draws import recipe_values
from rayfed_lora.tuning.space import Drawn, Space

# The key of a trial's config that holds its draw.
DRAW = "draw"
_SAMPLES = 200


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
        how.choice if how.randint is None else range(how.randint[0], how.randint[1] + 1)
        for how in space.drawn.values()
    ]
    draws = [
        dict(zip(space.drawn, values, strict=True))
        for values in itertools.product(*(column or () for column in columns))
    ]
    return list({json.dumps(recipe_values(space, d, recipe)): d for d in draws}.values())


def draws(space: Space, recipe: Recipe) -> Iterator[Mapping[str, Any]]:
    """Yield all draws of a grid, and of other spaces 200 seeded by the recipe's seed."""
    if space.search == "grid":
        yield from grid(space, recipe)
        return
    random = np.random.RandomState(recipe.seed)
    domains = {key: domain(how) for key, how in space.drawn.items()}
    for _ in range(_SAMPLES):
        yield {key: values.sample(random_state=random) for key, values in domains.items()}
