"""Checks of a search space against the recipe, before any trial runs. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping

from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tuning.distributions import draws
from rayfed_lora.tuning.draws import trial_recipe, value_of
from rayfed_lora.tuning.space import Drawn, Space

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


def invalid_draws(space: Space, recipe: Recipe) -> int:
    """Return how many of a thousand draws are not valid recipes; 0 for a good space.

    Raises:
        BadInputError: no draw is valid; the message has the reason of the first.
    """
    count = 0
    first: BadInputError | None = None
    tried = list(draws(space, recipe))
    for draw in tried:
        try:
            trial_recipe(space, recipe, draw)
        except BadInputError as error:
            count, first = count + 1, first or error
    if first is not None and count == len(tried):
        raise BadInputError(f"search space: no draw is a valid recipe; e.g. {first}")
    return round(1000 * count / len(tried))


def without_effect(space: Space, recipe: Recipe) -> list[str]:
    """Return the drawn keys that the recipe's mode ignores or whose condition is never met."""
    never = [key for key, how in space.drawn.items() if _never_met(space, recipe, how)]
    if "method" in space.drawn or "annealing.mode" in space.drawn:
        return never
    ignored = _IGNORED[recipe.annealing.mode]
    return [key for key in space.drawn if key.startswith(ignored) or key in never]


def _never_met(space: Space, recipe: Recipe, how: Drawn) -> bool:
    for key, wanted in how.when.items():
        other = space.drawn.get(key)
        possible = [value_of(recipe, key)] if other is None else other.choice
        if possible is not None and wanted not in possible:
            return True
    return False
