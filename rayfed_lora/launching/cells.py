"""The cells of a comparison: a recipe under each method and seed. Source: this project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed_lora.errors import BadInputError
from rayfed_lora.locations import child
from rayfed_lora.pages.comparison import Cell
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
) -> list[Cell]:
    """Return the cells of a comparison, seed by seed.

    Methods of the same seed share their data: where `data.validation_fraction` is auto, all hold
    out the largest fraction that one of them needs.

    Args: as for `compare`.

    Raises:
        BadInputError: no method or seed, a duplicate, or a recipe that is rejected.
    """
    if not isinstance(settings, Mapping):
        settings = dict(override_pairs("--set", settings))
    variants = _variants(methods, seeds, settings)
    # Loaded under a method each: the bare recipe may not be valid with the common settings.
    bases = {name: load_recipe(recipe, settings, own) for name, own in variants.items()}
    notes = tuple(given_way_in_comparison(next(iter(bases.values())), seeds))
    held_out = {name: _held_out(base) for name, base in bases.items()}
    largest = max(fraction or 0.0 for fraction in held_out.values())
    cells: list[Cell] = []
    for seed in seeds:
        for name, own in variants.items():
            overrides = {**own, "seed": seed}
            if held_out[name] is not None and largest > 0:
                overrides["data.validation_fraction"] = largest
            loaded = load_recipe(recipe, settings, overrides)
            if cells and loaded.runtime != cells[0].recipe.runtime:
                raise BadInputError(
                    f"methods: expected the same runtime for all, since they share actors; {name!r}"
                    f" has another than {cells[0].method!r}"
                )
            # A key without effect under one method may have an effect under another: no notes.
            loaded = loaded.with_provenance(
                frozenset(), (*loaded.overruled, *(() if cells else notes))
            )
            location = child(out, name, f"seed-{seed}")
            cells.append(Cell(name, seed, with_absolute_paths(loaded), location))
    return cells


def _variants(
    methods: Methods, seeds: Sequence[int], settings: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """Return the overrides of each method by name, after checking methods, seeds and settings."""
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise BadInputError(f"--{name}: expected at least one, none twice, got {list(values)}")
    if not isinstance(methods, Mapping):
        methods = {name: {"method": name} for name in methods}
    for name in methods:
        if not _NAME.fullmatch(name):
            raise BadInputError(
                f"methods: expected names of letters, digits, '.', '_' and '-', got {name!r}"
            )
    if "method" in settings and all("method" in own for own in methods.values()):
        raise BadInputError("--set method: expected none, --methods names those of a comparison")
    return methods


def _held_out(recipe: Recipe) -> float | None:
    """Return the fraction of the data that the method itself holds out; None if the user set it."""
    return recipe.validation_fraction if recipe.data.validation_fraction == "auto" else None
