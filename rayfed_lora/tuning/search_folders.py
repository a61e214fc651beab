"""Folders of searches and of their trials: claims, metrics, copies. Source: this project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.endpoints import named_in
from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.pages.search_page import SEARCH_FILE
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml, yaml_text
from rayfed_lora.runs import checkpoints, checksums, seals
from rayfed_lora.runs.claiming import check_unused, differences, kept_recipe
from rayfed_lora.runs.summary import TESTED
from rayfed_lora.runs.trackers import EVENTS_FOLDER, TRACKING_FILE
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.draws import continued, recipe_values, trial_recipe
from rayfed_lora.tuning.space import Space

_CHANGES_FILE = "changes.json"
_NOT_COPIED = {TRACKING_FILE, EVENTS_FOLDER, "wandb"}
# Summed over rounds.
_SUMMED = ("bytes_up", "bytes_down", "bytes_base", "seconds")


def claim_search(
    folder: RunFolder, space: Space, recipe: Recipe, max_concurrent: int | None, resume: bool
) -> int | None:
    """Check that a search may use the folder; write nothing but a probe.

    Returns the maximum number of concurrent trials: of the folder's search if present, since Tune
    cannot change it, else `max_concurrent`.

    Raises:
        RunFolderError: the folder holds another search, other files, or a search and `resume` is
            false.
    """
    if not folder.exists(SEARCH_FILE):
        check_unused(folder)
        folder.check_writable()
        return max_concurrent
    if not resume:
        raise RunFolderError(
            f"{folder.location} holds a search already; resume it with --resume, or choose another"
            " --out"
        )
    try:
        kept = parse_yaml(folder.location, seals.text(folder, SEARCH_FILE))
        kept_space, kept_recipe = Space.model_validate(kept["space"]), load_recipe(kept["recipe"])
        limit: int | None = kept["max_concurrent"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(
            f"{child(folder.location, SEARCH_FILE)} cannot be read: {error}"
        ) from None
    fields = Space.model_fields
    changed = [name for name in fields if getattr(kept_space, name) != getattr(space, name)]
    changed += differences(kept_recipe, recipe)
    changed += ["max_concurrent"] * (max_concurrent not in (None, limit))
    if changed:
        raise RunFolderError(
            f"{folder.location} holds another search; these differ: {', '.join(changed)}"
        )
    return limit


def write_search(
    folder: RunFolder, space: Space, recipe: Recipe, max_concurrent: int | None
) -> None:
    """Write search.yaml unless it exists."""
    if not folder.exists(SEARCH_FILE):
        plain = {"space": space.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}
        content = yaml_text({**plain, "max_concurrent": max_concurrent})
        folder.write(SEARCH_FILE, seals.sealed_text(content))


def measured(rounds: pa.Table) -> dict[str, Any]:
    """Return the metrics that a trial reports after the rows of rounds.parquet, at least one.

    These are the number of finished rounds (`round`), stage, rank and train_loss of the newest
    round, metrics of the newest test, and the sums of bytes and seconds.
    """
    found: dict[str, Any] = {"round": rounds.num_rows}
    found |= {name: rounds[name][-1].as_py() for name in ("stage", "rank", "train_loss")}
    for name in TESTED:
        tested = rounds[name].drop_null()
        found[name] = tested[-1].as_py() if len(tested) > 0 else None
    found |= {name: pc.sum(rounds[name]).as_py() for name in _SUMMED}
    return found | {"total_bytes": found["bytes_up"] + found["bytes_down"]}


def copy_run(source: RunFolder, to: RunFolder, folder: str = "") -> None:
    """Copy a run folder without the files of its trackers."""
    for name in source.names(folder):
        if name in _NOT_COPIED:
            continue
        path = f"{folder}/{name}" if folder else name
        if source.is_folder(path):
            copy_run(source, to, path)
        elif not name.startswith("."):
            to.write(path, source.read(path))


def current_recipe(
    folder: RunFolder, space: Space, recipe: Recipe, draw: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of the run in a trial's folder, or that of its draw if there is none."""
    # Endpoints of the search's recipe count as named by the user in its trials, too.
    kept = kept_recipe(folder, named_in(recipe.model_dump()))
    return trial_recipe(space, recipe, draw) if kept is None else kept


def apply_draw(folder: RunFolder, space: Space, recipe: Recipe, draw: Mapping[str, Any]) -> None:
    """Apply a draw to the remaining rounds of a run; its past and number of rounds stay.

    The changed values and the round after which they hold are added to changes.json.
    """
    named = named_in(recipe.model_dump())
    before = kept_recipe(folder, named)
    snapshot = checkpoints.newest(folder, lambda text: None)
    # A finished run has no remaining rounds, and its files are sealed by checksums.
    if before is None or snapshot is None or folder.exists(checksums.SUMMARY_FILE):
        return
    settings = recipe_values(space, draw, recipe)
    drawn = load_recipe(recipe, settings, endpoints=named)
    settings |= continued(before, drawn, snapshot.rounds)
    after = load_recipe(recipe, settings, endpoints=named)
    if after == before:
        return
    all_changes = [*changes(folder), {"after_round": snapshot.rounds, "settings": settings}]
    folder.write(_CHANGES_FILE, json.dumps(all_changes, indent=1).encode())
    folder.write("recipe.yaml", seals.sealed_text(recipe_yaml(after)))


def changes(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the changes of draws during a run: `after_round` and `settings` of each."""
    if not folder.exists(_CHANGES_FILE):
        return []
    found: list[dict[str, Any]] = json.loads(folder.read(_CHANGES_FILE))
    return found
