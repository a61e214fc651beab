"""The methods that a recipe chooses. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from rayfed_lora.plugins.registry import Method
from rayfed_lora.plugins.tables import ACCEPTANCES, ALLOCATIONS, DATA, METRICS, SHAPES
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.fields import Choosing
from rayfed_lora.recipe.model import Model
from rayfed_lora.recipe.runtime import Evaluation


def chosen_methods(section: BaseModel) -> Iterator[Method[Any]]:
    """Yield the methods that a section and those inside it choose, in the order of the keys."""
    if isinstance(section, Choosing):
        yield from () if section.chosen is None else (section.chosen,)
    if isinstance(section, Data) and isinstance(section.test_source, str):
        if section.test_source in DATA:
            yield DATA.method(section.test_source)
    if isinstance(section, Evaluation):
        yield from map(METRICS.method, section.metrics)
    if isinstance(section, Model) and section.own is not None:
        yield section.own
    if isinstance(section, Annealing):
        # Texts, where they have no options.
        yield ACCEPTANCES.method(section.accepts.name)
        yield ALLOCATIONS.method(section.allocates.name)
        yield SHAPES.method(section.cooling.shape)
        return
    for value in vars(section).values():
        if isinstance(value, BaseModel):
            yield from chosen_methods(value)
