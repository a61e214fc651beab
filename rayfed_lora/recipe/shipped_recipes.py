"""The recipes that come with the package. Source: this project."""

from __future__ import annotations

from importlib import resources

from rayfed_lora.errors import Fault, RecipeError
from rayfed_lora.recipe.faults import closest

_FOLDER = resources.files("rayfed_lora") / "recipe" / "shipped"


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _FOLDER.iterdir() if p.name.endswith(".yaml")
    )


def shipped_text(name: str) -> str:
    """Return the YAML text of a shipped recipe.

    Raises:
        RecipeError: no recipe of that name is shipped.
    """
    names = shipped_names()
    if name not in names:
        expected = f"a shipped recipe ({', '.join(names)}) or a path"
        raise RecipeError(name, [Fault("RECIPE", expected, repr(name), closest(name, names))])
    return (_FOLDER / f"{name}.yaml").read_text("utf-8")
