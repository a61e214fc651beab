"""Where the own methods of a run come from: plugins.json of its folder. Source: this project."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.plugins.modules import origin
from rayfed_lora.recipe.chosen import chosen_methods
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.storage import RunFolder

PLUGINS_FILE = "plugins.json"


def origins(recipe: Recipe) -> list[dict[str, Any]]:
    """Return kind, name, module, version and SHA-256 of each own method that a recipe chooses."""
    return [asdict(origin(method)) for method in chosen_methods(recipe) if not method.built_in]


def check_origins(folder: RunFolder, recipe: Recipe) -> None:
    """Check that a run in a folder began with the own methods that are here now.

    Raises:
        RunFolderError: their code, or the record of it, is another one.
    """
    before = _read(folder)
    now = origins(recipe)
    if not before or before[-1]["methods"] == now:
        return
    old = {(each["kind"], each["name"]): each for each in before[-1]["methods"]}
    changed = [each for each in now if old.get((each["kind"], each["name"])) != each]
    names = ", ".join(f"{each['kind']} {each['name']!r} of {each['module']}" for each in changed)
    raise RunFolderError(
        f"run folder {folder.location}: the code of these methods is not that of the finished"
        f" rounds: {names or 'methods that are gone'}; expected the same files, a new --out, or"
        " --accept-changed-plugins, which goes on and records the change"
    )


def record_origins(folder: RunFolder, recipe: Recipe, round_index: int) -> None:
    """Write the own methods of a run from a round on, where they are not those recorded last."""
    before, now = _read(folder), origins(recipe)
    if (before[-1]["methods"] if before else []) != now:
        record = [*before, {"from_round": round_index, "methods": now}]
        folder.write(PLUGINS_FILE, json.dumps(record, indent=1).encode())


def _read(folder: RunFolder) -> list[dict[str, Any]]:
    if not folder.exists(PLUGINS_FILE):
        return []
    try:
        found: list[dict[str, Any]] = json.loads(folder.read(PLUGINS_FILE))
        for each in found:
            for method in each["methods"]:
                method["kind"], method["name"]
    except (ValueError, TypeError, LookupError) as error:
        where = child(folder.location, PLUGINS_FILE)
        raise RunFolderError(f"{where} cannot be read: {error}") from error
    return found
