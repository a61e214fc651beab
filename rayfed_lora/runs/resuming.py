"""The recipe of a run and the place of its folder, from what a user names. Source: this project."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed_lora.errors import BadInputError, RunFolderError, did_you_mean
from rayfed_lora.locations import child, is_uri, parent
from rayfed_lora.plugins.modules import permit
from rayfed_lora.recipe.faults import closest
from rayfed_lora.recipe.loading import load_recipe, shipped_names
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import absolute_place, job_id, run_location


def recipe_and_place(
    source: Recipe | str | Path | Mapping[str, Any],
    out: str | None,
    resume: bool,
    overrides: Sequence[str] = (),
    plugins: Sequence[Any] = (),
) -> tuple[Recipe, str]:
    """Return the recipe of a run and the location of its folder.

    Args:
        source: as for `run`: a recipe, or with `resume` the folder of a run, whose stored recipe
            is used.
        out: location of the folder; None: that of `source`, `storage.path`, or a new one.
        resume: continue the run in the folder, which has to exist. The command of a Ray job may
            start the run: the cluster repeats the same command.
        overrides: `key.path=value` texts.
        plugins: own methods that are allowed, as for `load_recipe`.

    Raises:
        RecipeError: the recipe is rejected.
        RunFolderError: there is no run to continue; the message has the nearest existing name.
        BadInputError: `source` is a run folder and `resume` is false, or `out` is another folder.
    """
    # Before a stored recipe is read, which may name them.
    permit(plugins)
    folder = _run_folder(source, out, resume)
    if folder is not None:
        return _stored(folder, overrides), folder
    recipe = load_recipe(source, overrides, plugins=plugins)
    place = out or recipe.storage.path
    if resume and place is None:
        raise BadInputError(
            "--resume: give the folder of the run to continue, `rayfed-lora run DIR --resume`, or"
            " give --out"
        )
    location = run_location(place, recipe.name)
    if resume and job_id() is None:
        refuse_missing(location)
    return recipe, location


def refuse_missing(location: str) -> None:
    """Raise RunFolderError, with the nearest existing name, where a folder does not exist."""
    from rayfed_lora.storage import RunFolder

    if not RunFolder(location).exists(""):
        raise RunFolderError(f"--resume: there is no folder {location!r}{_nearest(location)}")


def _run_folder(source: Any, out: str | None, resume: bool) -> str | None:
    """Return the folder that `source` names in place of a recipe, None where it names none."""
    if not isinstance(source, (str, Path)) or Path(source).suffix in {".yaml", ".yml"}:
        return None
    text = str(source)
    path = Path(text).expanduser()
    # `pathlib` raises for names that are too long.
    is_folder, exists = os.path.isdir(path), os.path.exists(path)
    holds_run = is_folder and os.path.exists(path / "recipe.yaml")
    missing = resume and out is None and not exists and text not in shipped_names()
    without_run = resume and out is None and is_folder
    if not (is_uri(text) or holds_run or without_run or missing):
        return None
    folder = text if is_uri(text) else str(path)
    if not resume:
        again, anew = shlex.quote(folder), shlex.quote(child(folder, "recipe.yaml"))
        raise BadInputError(
            f"RECIPE: {folder!r} is the folder of a run; `rayfed-lora run {again} --resume`"
            f" continues it, `rayfed-lora run {anew}` runs its recipe in a new folder"
        )
    if out is not None and absolute_place(out) != absolute_place(folder):
        raise BadInputError(
            f"--out: expected none beside the run folder {folder!r}, which is continued where it"
            f" is; got {out!r}"
        )
    return folder


def _stored(folder: str, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of the run in a folder, with overrides."""
    from rayfed_lora.runs.claiming import kept_recipe
    from rayfed_lora.storage import RunFolder

    refuse_missing(folder)
    recipe = kept_recipe(RunFolder(folder))
    if recipe is None:
        raise RunFolderError(
            f"--resume: {folder!r} holds no run (recipe.yaml){_nearest(folder)}; where the run had"
            " not begun, give its recipe and --out"
        )
    return load_recipe(recipe, overrides) if overrides else recipe


def _nearest(location: str) -> str:
    """Return a text with the most similar name beside a location, empty where none is similar."""
    from rayfed_lora.storage import RunFolder

    where, name = parent(location.rstrip("/"))
    found = closest(name, [other for other in RunFolder(where).names() if other != name])
    return did_you_mean(found if found is None or where == "." else child(where, found))
