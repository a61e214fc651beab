"""What of a recipe does not travel with a job. Source: this project."""

from __future__ import annotations

from pathlib import Path

from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import with_absolute_paths


def notes_on(recipe: Recipe, location: str, *, given: bool) -> tuple[str, ...]:
    """Say what does not travel, and what goes with the cluster.

    Args:
        recipe: of the job.
        location: its run folder.
        given: the user has chosen it.

    Raises:
        BadInputError: a file is named in a way that a job cannot find it.
    """
    notes = []
    for key, source in files_named(recipe):
        notes.append(
            f"{key}: {source} is not sent along: every node of the cluster needs it under this path"
        )
    if not given:
        notes.append(
            f"run folder {location} is on the head node's disk and goes with it: --out s3://bucket/..."
            " or a shared folder keeps it"
        )
    return tuple(notes)


def files_named(recipe: Recipe) -> list[tuple[str, str]]:
    """Return recipe keys that name files or folders of a machine, with their absolute paths.

    Raises:
        BadInputError: one is a relative path to nothing: in a job it would be as well.
    """
    here = with_absolute_paths(recipe)
    named = {
        "data.source": (recipe.data.source, here.data.source),
        "clients.availability.trace": (
            recipe.clients.availability.trace or "",
            here.clients.availability.trace or "",
        ),
        "model.source": (recipe.model.source, here.model.source),
        "model.tokenizer": (recipe.model.tokenizer or "", here.model.tokenizer or ""),
    }
    found = []
    for key, (written, absolute) in named.items():
        if absolute.startswith("/"):
            found.append((key, absolute))
        elif _is_relative_path(key, written):
            raise BadInputError(
                f"{key}: {written!r} is not here, and a job runs in another folder: give a URI, or"
                " an absolute path that every node of the cluster sees"
            )
    return found


def _is_relative_path(key: str, source: str) -> bool:
    if "://" in source or source.startswith("hf:"):
        return False
    has_ending = not key.startswith("model.") and Path(source).suffix != ""
    return has_ending or source.startswith(("./", "../", "~"))
