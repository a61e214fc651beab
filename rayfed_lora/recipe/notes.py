"""Notes on a recipe: settings of the user that have no effect. They are no errors.

A note names keys that the user set (`Recipe.asked`) and whose value differs from the default of the
recipe's method. A resolved recipe, in which every key is written, gets no such notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from rayfed_lora.endpoints import strangers_in
from rayfed_lora.recipe.idle_keys import idle_keys
from rayfed_lora.recipe.presets import filled
from rayfed_lora.recipe.recipe import Recipe


def unused(recipe: Recipe) -> tuple[str, ...]:
    """Return a line for each setting of a recipe that will not be applied as written."""
    notes = [*recipe.overruled, *_without_credentials(recipe)]
    left = _chosen(recipe)
    for reason, keys in idle_keys(recipe):
        sections = tuple(key for key in keys if key.endswith("."))
        idle = [key for key in left if key in keys or key.startswith(sections)]
        left = [key for key in left if key not in idle]
        if idle:
            notes.append(f"no effect with {reason}: {', '.join(idle)}")
    if "clients.ranks" in left:
        notes += _spare_ranks(recipe)
    return tuple(notes)


def given_way_in_comparison(recipe: Recipe, seeds: Sequence[int]) -> Iterator[str]:
    """Yield a line for each key of a recipe that a comparison overrules."""
    if recipe.seed != 0 and recipe.seed not in seeds:
        yield f"seed {recipe.seed} of the recipe gives way to the seeds of the comparison"
    if recipe.storage.path is not None:
        yield "storage.path has no effect in a comparison: each run has a folder of its own"


def given_way_in_search(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each key of a recipe that a search overrules."""
    if recipe.storage.path is not None:
        yield "storage.path has no effect in a search: each trial has a folder of its own"
    if recipe.storage.checkpoint_every != 1:
        yield "storage.checkpoint_every has no effect in a search: every round is saved"
    if recipe.runtime.executor != "ray":
        yield "runtime.executor has no effect in a search, which runs on Ray"


def _without_credentials(recipe: Recipe) -> Iterator[str]:
    for key, server in strangers_in(recipe.model_dump()):
        yield (
            f"{key} names the object store {server}: requests to it carry no credentials, since"
            " only the recipe names it"
        )


def _chosen(recipe: Recipe) -> list[str]:
    """Return the keys that the user set to a value other than the default."""
    given = {
        "method": recipe.method,
        "model": {"task": recipe.model.task},
        "clients": {"optimizer": {"name": recipe.clients.optimizer.name}},
    }
    chosen = [key for key, value, usual in _values(recipe, filled(given)) if value != usual]
    if recipe.asked is None:
        return chosen
    asked = tuple(f"{path}." for path in recipe.asked)
    return [key for key in chosen if f"{key}.".startswith(asked)]


def _values(section: BaseModel, usual: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key with its value and its usual one under the recipe's method."""
    known = usual if isinstance(usual, Mapping) else {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        whole = field.is_required() or field.default_factory is not None
        if whole and isinstance(value, BaseModel):
            yield from _values(value, known.get(name), f"{path}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            # A preset's null stands for the default.
            yield f"{path}{name}", value, known.get(name, default)


def _spare_ranks(recipe: Recipe) -> Iterator[str]:
    ranks, partition = recipe.clients.ranks, recipe.data.partition
    if isinstance(ranks, list) and partition.kind != "column" and len(ranks) > partition.clients:
        spare = len(ranks) - partition.clients
        yield (
            f"the last {spare} of the {len(ranks)} ranks of clients.ranks have no effect: there are"
            f" {partition.clients} clients"
        )
