"""The folder of a search: claimed by a new search or by one that resumes. Source: this project."""

from __future__ import annotations

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.pages.search_page import SEARCH_FILE
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml, yaml_text
from rayfed_lora.runs import seals
from rayfed_lora.runs.claiming import check_unused, differences
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.space import Space


def claim_search(
    folder: RunFolder, space: Space, recipe: Recipe, max_concurrent: int | None, resume: bool
) -> int | None:
    """Check that a search may use the folder; write nothing but a probe.

    Returns:
        The maximum number of concurrent trials: of the folder's search if present, since Tune
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
