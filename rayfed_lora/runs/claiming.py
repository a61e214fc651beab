"""Claims on run folders, and the run in a folder: its recipe, and whether it is complete."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rayfed_lora.endpoints import unguarded
from rayfed_lora.errors import RecipeError, RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.plugins.modules import flags, missing
from rayfed_lora.printable import echo
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.runtime import Runtime
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs import checksums, seals
from rayfed_lora.runs.checkpoints import last_saved
from rayfed_lora.runs.lengthened import check_past, is_lengthened
from rayfed_lora.runs.outcome import ending
from rayfed_lora.runs.ownership import Lease, Ticket, owner_of, take
from rayfed_lora.runs.provenance import check_origins
from rayfed_lora.runs.seals import is_rewritten
from rayfed_lora.runs.trackers import check_tracking
from rayfed_lora.storage import RunFolder

# Keys that may change when a run is resumed: they do not affect its results.
_FREE_KEYS: Any = {
    "storage": True,
    "tracking": True,
    "runtime": set(Runtime.model_fields) - {"cohort_size", "precision"},
}


def claim(
    folder: RunFolder, recipe: Recipe, resume: bool, *, accept_changed_plugins: bool = False
) -> None:
    """Check that a run may use the folder; write nothing but a probe.

    With `accept_changed_plugins` the code of own methods may have changed since the run began.

    Raises:
        RunFolderError: it holds a run and `resume` is false, or another run, or other files, or
            cannot be written.
        BadInputError: a tracker that the recipe asks for is not installed.
    """
    check_tracking(recipe)
    _check_content(folder, recipe, resume, owner_of(folder))
    if resume and not accept_changed_plugins:
        check_origins(folder, recipe)
    folder.check_writable()


def _check_content(
    folder: RunFolder, recipe: Recipe, resume: bool, owner: str | None = None
) -> None:
    where = f"run folder {folder.location} holds a run"
    kept = kept_recipe(folder) if resume else None
    if kept is not None:
        changed = differences(kept, recipe)
        if is_lengthened(changed):
            check_past(where, kept, recipe, last_saved(folder))
        elif changed:
            raise RunFolderError(
                f"{where} of another recipe; these keys differ: {', '.join(changed)}"
            )
    elif folder.exists("recipe.yaml"):
        again = shlex.join([folder.location, "--resume", *flags(recipe.plugins)])
        raise RunFolderError(
            f"{where} already; `rayfed-lora run {again}` continues"
            " it, --out starts another one elsewhere"
            if owner is None
            else f"{where}, owned by {owner}: choose another --out"
        )
    else:
        check_unused(folder)


@contextmanager
def claimed(folder: RunFolder, recipe: Recipe, resume: bool) -> Iterator[Lease]:
    """Own a folder that `claim` has checked, and check it once more before the run starts.

    The running process takes the folder over by the lease's ticket. Raises RunFolderError where
    another process owns the folder, or has used it meanwhile.
    """
    lease = take(folder, Ticket.of_this_process(), wait=resume, tell=say)
    try:
        _check_content(folder, recipe, resume)
        yield lease
    finally:
        lease.release()


def say(text: str) -> None:
    """Print a line for the user before the run has a status to show it."""
    echo(f"rayfed-lora: {text}", file=sys.stderr)


def check_unused(folder: RunFolder) -> None:
    """Check that a folder is new or empty, or raise RunFolderError.

    Scratch files of a killed write do not count.
    """
    if any(not name.startswith(".") for name in folder.names()):
        raise RunFolderError(
            f"run folder {folder.location}: expected a new or empty folder, or one with a run;"
            " it has other files in it"
        )


def kept_recipe(
    folder: RunFolder, endpoints: Collection[str] = (), *, model_only: bool = False
) -> Recipe | None:
    """Return the recipe of the run in a folder, None where it holds no run.

    Args:
        folder: of the run.
        endpoints: object stores that the user has named, as for `load_recipe`.
        model_only: where the recipe names code that is not allowed here, return what it says of
            model and data, all else as by default; the code is not imported.

    Raises:
        RunFolderError: the recipe cannot be read, or names code that is not allowed here.
    """
    if not folder.exists("recipe.yaml"):
        return None
    try:
        raw = parse_yaml(folder.location, seals.text(folder, "recipe.yaml"))
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected a mapping, got {type(raw).__name__}")
        if model_only and missing([str(name) for name in raw.get("plugins") or ()]):
            raw = {key: raw[key] for key in _OF_THE_MODEL if key in raw}
            data = raw.get("data")
            if isinstance(data, Mapping):
                # Not the options of an own data set.
                known = set(Data.model_fields) - {"partition"}
                raw["data"] = {key: value for key, value in data.items() if key in known}
        return load_recipe(raw, endpoints=endpoints)
    except (OSError, ValueError, RecipeError) as error:
        where = child(folder.location, "recipe.yaml")
        raise RunFolderError(f"{where} cannot be read: {error}") from None


# The keys that an export needs.
_OF_THE_MODEL = ("name", "method", "seed", "model", "adapter", "data")


def lengthened(folder: RunFolder, recipe: Recipe) -> bool:
    """Return whether a run folder, if it holds a run, has a schedule of another length."""
    kept = kept_recipe(folder)
    return kept is not None and is_lengthened(differences(kept, recipe))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Return the keys in which two recipes differ and that affect results, sorted."""
    return sorted(_differences(a.model_dump(exclude=_FREE_KEYS), b.model_dump(exclude=_FREE_KEYS)))


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = dict.fromkeys([*a, *b])
        return [
            p for k in keys for p in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [path] if any(_differences(x, y, path) for x, y in zip(a, b, strict=True)) else []
    if isinstance(a, str) and isinstance(b, str):
        # The location is the same with and without credentials.
        a, b = unguarded(a), unguarded(b)
    return [] if a == b else [path]


def complete(folder: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of a finished and undamaged run; None where the run has to be resumed.

    A finished run with damaged files is not complete: it resumes from its last checkpoint, and
    writes the summary and the exported model again. Nor is one whose schedule has another length
    now. Raises RunFolderError where a damaged file cannot be written again.
    """
    return inspected(folder, recipe)[0]


def inspected(folder: RunFolder, recipe: Recipe) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what `complete` returns, raising as it does, and the files to be written again."""
    faults = checksums.faults(folder)
    if not faults:
        summary = checksums.read_summary(folder)
        if summary is None or not lengthened(folder, recipe):
            return summary, []
        if (by := ending(summary)) is not None:
            raise RunFolderError(
                f"run folder {folder.location}: it was ended by {by}, and a longer schedule does"
                " not change that; to go on, start another run from its adapter, --set"
                f" model.adapter={shlex.quote(folder.location)}"
            )
        return None, []
    for name, text in faults.items():
        if not is_rewritten(folder, name):
            raise RunFolderError(text)
    return None, [*faults]
