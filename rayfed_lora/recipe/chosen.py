"""The methods that a recipe chooses. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from rayfed_lora.plugins.registry import Method
from rayfed_lora.recipe.fields import Choosing


def chosen_methods(section: BaseModel) -> Iterator[Method[Any]]:
    """Yield the method of each section that chooses one, in the order of the recipe's keys."""
    if isinstance(section, Choosing):
        key, table = section.choice
        yield table.method(getattr(section, key))
    for value in vars(section).values():
        if isinstance(value, BaseModel):
            yield from chosen_methods(value)
