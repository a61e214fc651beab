"""The recipe of a draw from a search space. Source: this project.

Every draw maps to a recipe that can run: ranks are shares of other ranks, rounds are shares of a
fixed total, and a value with an unmet condition (`when`) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from rayfed_lora.annealing.stages import stage_lengths
from rayfed_lora.endpoints import named_in
from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.presets import usual_scaling, usual_server_rate
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tuning.space import ROUNDS, Space, is_number
from rayfed_lora.types import Stage


def trial_recipe(space: Space, recipe: Recipe, draw: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a draw with a value for each key; RecipeError if they conflict."""
    # Only endpoints of the user's recipe get credentials; a space cannot add any.
    endpoints = named_in(recipe.model_dump())
    return load_recipe(recipe, recipe_values(space, draw, recipe), endpoints=endpoints)


def recipe_values(space: Space, draw: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the recipe values of a draw, by key; BadInputError for a share of a non-number."""
    found: dict[str, Any] = {}

    def value(key: str) -> Any:
        return found[key] if key in found else value_of(recipe, key)

    for key, how in space.parameters.items():
        if any(value(other) != wanted for other, wanted in how.when.items()):
            continue
        found[key] = draw[key]
        if how.of is not None:
            share, whole = draw[key], value(how.of)
            if not (is_number(share) and is_number(whole)):
                raise BadInputError(
                    f"search space: {key}: expected a number and a number to multiply it by, got"
                    f" {share!r} and {whole!r}"
                )
            found[key] = max(1, math.floor(float(share * whole) + 0.5))
    skipped = value("annealing.initiating.trainable") == "none"
    shared = [key for key in space.rounds if not (skipped and key == ROUNDS[0])]
    if shared:
        total = sum(value_of(recipe, key) for key in shared)
        found |= apportioned({key: draw[key] for key in shared}, total)
    return {**_optimizer_defaults(recipe, found), **found}


def _optimizer_defaults(recipe: Recipe, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the drawn optimisers, where the recipe has the defaults of its own.

    A resolved recipe does not say which values the user has written.
    """
    if "method" in drawn:
        return {}  # the method's preset has its own defaults
    found: dict[str, Any] = {}
    clients, server = recipe.clients.optimizer, recipe.aggregation.server_optimizer
    name = drawn.get("clients.optimizer.name", clients.name)
    scaling = usual_scaling(recipe.method, name)
    if recipe.adapter.scaling == usual_scaling(recipe.method, clients.name) != scaling:
        found["adapter.scaling"] = scaling
    lr = usual_server_rate(drawn.get("aggregation.server_optimizer.name", server.name))
    if server.lr == usual_server_rate(server.name) != lr:
        found["aggregation.server_optimizer.lr"] = lr
    return found


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a key such as `annealing.heating.rank`; BadInputError if unknown."""
    found: Any = recipe
    for part in key.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, BaseModel) and part in type(found).model_fields:
            found = getattr(found, part)
        else:
            raise BadInputError(f"search space: {key}: expected a key of the recipe")
    return found


def apportioned(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Return whole numbers in proportion to the shares, with the sum `total`.

    The largest remainders are rounded up (Hamilton's method), the first of equal ones. Shares that
    are all 0 count as equal.

    >>> apportioned({"a": 1.0, "b": 1.0, "c": 0.5}, 9)
    {'a': 4, 'b': 3, 'c': 2}
    """
    whole = math.fsum(shares.values())
    exact = {
        key: (share / whole if whole > 0 else 1 / len(shares)) * total
        for key, share in shares.items()
    }
    found = {key: math.floor(value) for key, value in exact.items()}
    left = total - sum(found.values())
    # Sorting is stable, so the first of equal remainders comes first.
    for key in sorted(exact, key=lambda key: found[key] - exact[key])[:left]:
        found[key] += 1
    return found


def continued(before: Recipe, after: Recipe, rounds_done: int) -> dict[str, int]:
    """Return the stage lengths of `after`, changed to keep the past of `before` and its total.

    A finished stage keeps its length, the current stage is no shorter than its finished rounds
    (`rounds_done` > 0 in all), and holding takes up the difference. Empty in the modes `full` and
    `fixed`, without stages.
    """
    if before.annealing.mode != "staged":
        return {}
    old, new = stage_lengths(before.annealing), stage_lengths(after.annealing)
    total = sum(old.values())
    found: dict[Stage, int] = {}
    for stage, rounds in old.items():
        start = sum(found.values())
        finished = start + rounds <= rounds_done
        length = rounds if finished else max(new[stage], rounds_done - start)
        found[stage] = min(length, total - start)
    found["holding"] += total - sum(found.values())
    if before.annealing.initiating.trainable == "none":
        del found["initiating"]
    return {f"annealing.{stage}.rounds": length for stage, length in found.items()}
