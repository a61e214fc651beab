"""Files of a recipe: those that travel with its job, and those that do not.

Source: this project.
"""

from __future__ import annotations

from pathlib import Path

from rayfed_lora.data.memory import MEMORY_PREFIX
from rayfed_lora.errors import BadInputError
from rayfed_lora.locations import each
from rayfed_lora.plugins.modules import folder_of
from rayfed_lora.plugins.tables import DATA
from rayfed_lora.recipe.chosen import chosen_methods
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import with_absolute_paths


def travel_notes(recipe: Recipe, location: str, *, given: bool) -> list[str]:
    """Return notes on files that do not travel, and on a folder that is lost with the cluster.

    `given` says that the user has chosen the run folder `location`.

    Raises:
        BadInputError: a relative path names no file here.
    """
    notes = [
        f"{key}: {source} is not sent along: every node of the cluster needs it under this path"
        for key, source in files_named(recipe)
    ]
    sent = modules_of(recipe)
    notes += [
        f"plug-in {name} is an installed package: every node of the cluster needs it installed"
        for name in recipe.plugins
        if name.partition(".")[0] not in sent
    ]
    if not given:
        notes.append(
            f"run folder {location} is on the head node's disk and is lost with it:"
            " --out s3://bucket/... or a shared folder keeps it"
        )
    return notes


def refuse_memory(recipe: Recipe) -> None:
    """Raise a BadInputError where the rows are in this process's memory."""
    for key, source in _sources(recipe):
        if source.startswith(MEMORY_PREFIX):
            raise BadInputError(
                f"{key}: rows in memory do not travel with a job; expected a file or folder that"
                " every node of the cluster can read"
            )


def modules_of(recipe: Recipe) -> dict[str, Path]:
    """Return the file, or the folder of a package, of own methods that are not installed, by name.

    Raises:
        BadInputError: the recipe chooses a method of a notebook or script, whose code no file has.
    """
    for method in chosen_methods(recipe):
        if method.by_value:
            raise BadInputError(
                f"{method.kind} {method.name!r} is defined in a notebook, a script or a function,"
                " which a job does not have; expected it in a module of its own, named by plugins"
            )
    found = {}
    for name in recipe.plugins:
        top = name.partition(".")[0]
        folder = folder_of(top)
        if folder is not None:
            package = Path(folder, top)
            found[top] = package if package.is_dir() else package.with_suffix(".py")
    return found


def files_named(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the recipe keys that name local files or folders, with their absolute paths.

    Raises:
        BadInputError: a relative path names no file here, and would name none in a job.
    """
    absolute = _sources(with_absolute_paths(recipe))
    found = []
    for (key, written), (_, path) in zip(_sources(recipe), absolute, strict=True):
        if path.startswith("/"):
            found.append((key, path))
        elif written not in DATA and _is_relative_path(key, written):
            raise BadInputError(
                f"{key}: {written!r} is not here, and a job runs in another folder: give a URI, or"
                " an absolute path that every node of the cluster sees"
            )
    return found


def _sources(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the recipe keys that may name files, each with every value that it has."""
    values = {
        "data.source": recipe.data.source,
        "data.test_source": recipe.data.test_source,
        "clients.availability.trace": recipe.clients.availability.trace,
        "model.source": recipe.model.source,
        "model.tokenizer": recipe.model.tokenizer,
        "model.adapter": recipe.model.adapter,
    }
    return [(key, one) for key, value in values.items() for one in each(value)]


def _is_relative_path(key: str, source: str) -> bool:
    if "://" in source or source.startswith("hf:"):
        return False
    has_suffix = not key.startswith("model.") and Path(source).suffix != ""
    return has_suffix or source.startswith(("./", "../", "~"))
