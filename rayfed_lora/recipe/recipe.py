"""The recipe: settings that go together, and the record of how they were made.

The keys are a contract: they stand in every recipe that users keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from pydantic import PrivateAttr, ValidationInfo, model_validator

from rayfed_lora.plugins.modules import Plugins, carried
from rayfed_lora.recipe.checks import ConflictError, conflicts
from rayfed_lora.recipe.chosen import chosen_methods
from rayfed_lora.recipe.fields import ENDPOINTS
from rayfed_lora.recipe.plain_values import values_of
from rayfed_lora.recipe.presets import filled
from rayfed_lora.recipe.settings import Settings


class Recipe(Settings):
    """A federated fine-tuning run, complete."""

    # A call in Python applies the preset and the checks, as a file does. `model_copy` does not:
    # functions that take a recipe pass it through `load_recipe`.

    # The values at validation: copies that `model_copy` changes keep them.
    _made: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _asked: frozenset[str] | None = PrivateAttr(None)
    _overruled: tuple[str, ...] = PrivateAttr(())
    # Pickled with the recipe: own methods are there in every process that it reaches.
    _own_methods: Plugins = PrivateAttr(Plugins())

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal, wherever they come from."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    # Values may be mappings.
    __hash__ = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any, info: ValidationInfo) -> Any:
        named = (info.context or {}).get(ENDPOINTS, ())
        return filled(given, named) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _values_go_together(self) -> Recipe:
        self._made = dict(vars(self))
        self._own_methods = carried(self.plugins, chosen_methods(self))
        found = conflicts(self)
        if found:
            raise ConflictError(found)
        return self

    @classmethod
    def load(cls, source: Any, *, plugins: Sequence[Any] = ()) -> Recipe:
        """Return the recipe of a shipped name, a path or a mapping; arguments as `load_recipe`."""
        return _load(source, (), plugins)

    def with_(self, changes: Mapping[str, Any], *, plugins: Sequence[Any] = ()) -> Recipe:
        """Return a validated copy with other values by key path, as `--set` gives them.

        >>> Recipe.load("digits-vit").with_({"annealing.cooling.rank": 2}).annealing.cooling.rank
        2

        Raises:
            RecipeError: the values are rejected.
        """
        return _load(self, changes, plugins)

    @property
    def made(self) -> dict[str, Any]:
        """The nested values at validation; those of a copy that `model_copy` changed may differ."""
        return values_of(self._made or self)

    @property
    def preset(self) -> str:
        """The method whose preset has filled in keys; a changed copy may name another `method`."""
        return str(self.made["method"])

    @property
    def asked(self) -> frozenset[str] | None:
        """Keys that the user set, where other keys come from a resolved recipe or another method.

        None: all keys that are written. Empty in the runs of a comparison, whose keys are for
        several methods.
        """
        return self._asked

    @property
    def overruled(self) -> tuple[str, ...]:
        """The user's settings that had no effect, one line each."""
        return self._overruled

    def with_provenance(self, asked: frozenset[str] | None, overruled: tuple[str, ...]) -> Recipe:
        """Return an equal recipe with other values of `asked` and `overruled`."""
        copy = self.model_copy()
        copy._asked, copy._overruled = asked, overruled
        return copy


def _load(source: Any, changes: Any, plugins: Sequence[Any]) -> Recipe:
    # The loader knows recipes, presets and files; a recipe knows it only when asked.
    loading = import_module("rayfed_lora.recipe.loading")
    recipe: Recipe = loading.load_recipe(source, changes, plugins=plugins)
    return recipe
