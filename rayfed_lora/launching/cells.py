"""The cells of a comparison: a recipe under each method and seed. Source: this project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed_lora.errors import BadInputError
from rayfed_lora.locations import child
from rayfed_lora.pages.comparison_tables import Cell
from rayfed_lora.recipe.loading import load_recipe, override_pairs
from rayfed_lora.recipe.notes import given_way_in_comparison
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import with_absolute_paths

Methods = Sequence[str] | Mapping[str, Mapping[str, Any]]
# A method's name is also the name of a folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cells_of(
    recipe: Recipe | str | Path | Mapping[str, Any],
    methods: Methods,
    seeds: Sequence[int],
    out: str,
    settings: Sequence[str] | Mapping[str, Any] = (),
    plugins: Sequence[Any] = (),
) -> list[Cell]:
    """Return the cells of a comparison, seed by seed.

    Arguments as for `compare`. Methods of the same seed share their data: where
    `data.validation_fraction` is auto, all hold out the largest fraction that one of them needs.

    Raises:
        BadInputError: no method or seed, a duplicate, or a recipe that is rejected.
    """
    if not isinstance(settings, Mapping):
        settings = dict(override_pairs("--set", settings))
    variants = _variants(methods, seeds, settings)
    # Loaded under a method each: the bare recipe may not be valid with the common settings.
    bases = {
        name: load_recipe(recipe, settings, own, plugins=plugins) for name, own in variants.items()
    }
    notes = tuple(given_way_in_comparison(next(iter(bases.values())), seeds))
    held_out = {
        name: base.validation_fraction
        for name, base in bases.items()
        if base.data.validation_fraction == "auto"
    }
    largest = max(held_out.values(), default=0.0)
    cells: list[Cell] = []
    for seed in seeds:
        for name, own in variants.items():
            overrides = {**own, "seed": seed}
            if name in held_out and largest > 0:
                overrides["data.validation_fraction"] = largest
            loaded = load_recipe(recipe, settings, overrides, plugins=plugins)
            if cells and loaded.runtime != cells[0].recipe.runtime:
                raise BadInputError(
                    f"methods: expected the same runtime for all, since they share actors; {name!r}"
                    f" has another than {cells[0].method!r}"
                )
            # A key without effect under one method may have an effect under another: no notes.
            overruled = (*loaded.overruled, *(() if cells else notes))
            loaded = loaded.with_provenance(frozenset(), overruled)
            location = child(out, name, f"seed-{seed}")
            cells.append(Cell(name, seed, with_absolute_paths(loaded), location))
    return cells


def _variants(
    methods: Methods, seeds: Sequence[int], settings: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """Return the overrides of each method by name, checked."""
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise BadInputError(f"--{name}: expected at least one, none twice, got {list(values)}")
    if not isinstance(methods, Mapping):
        methods = {name: {"method": name} for name in methods}
    for name in methods:
        if not _NAME.fullmatch(name):
            expected = "expected names of letters, digits, '.', '_' and '-'"
            raise BadInputError(f"methods: {expected}, got {name!r}")
    if "method" in settings and all("method" in own for own in methods.values()):
        raise BadInputError("--set method: expected none, --methods names those of a comparison")
    return methods
