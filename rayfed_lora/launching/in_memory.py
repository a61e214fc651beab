"""Rows in memory on their way to a run's processes. Source: this project."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from rayfed_lora.data.memory import held_for, source_of
from rayfed_lora.engines.factory import Factory, WithTables
from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.recipe import Recipe


def data_settings(data: Any) -> list[str]:
    """Return the overrides of a recipe whose rows were handed over; none without `data`.

    Raises:
        DataError: `data` is nothing that has rows.
    """
    return [] if data is None else [f"data.source={source_of(data)}"]


def check_held(recipes: Iterable[Recipe]) -> None:
    """Raise a DataError where a recipe's rows were handed over to another process."""
    held_for(source for each in recipes for source in (each.data.source, each.data.test_source))


def refuse_held(recipe: Recipe, what: str) -> None:
    """Raise a BadInputError where rows are in memory, which `what` does not take along."""
    if held_for((recipe.data.source, recipe.data.test_source)):
        raise BadInputError(
            f"data: {what} takes no rows in memory along; expected a file, or a folder, that all"
            " nodes can read"
        )


def with_held(factory: Factory, recipes: Iterable[Recipe]) -> Factory:
    """Return a factory that brings rows in memory to Ray's workers; they are stored once.

    Needs a connection to Ray, and this process to live as long as the run.
    """
    held = held_for(source for each in recipes for source in (each.data.source,))
    if not held:
        return factory
    import ray

    return WithTables(factory, partial(ray.get, ray.put(held)))
