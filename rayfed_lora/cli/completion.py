"""Completion of arguments in a shell. Source: this project, on typer."""

from __future__ import annotations

import glob


def complete_recipes(incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe, or a path."""
    from rayfed_lora.recipe.loading import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)] + paths(incomplete)


def complete_methods(incomplete: str) -> list[str]:
    """Complete the last of several presets, separated by commas."""
    from rayfed_lora.recipe.presets import PRESETS

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in PRESETS if name.startswith(last)]


def complete_spaces(incomplete: str) -> list[str]:
    """Complete the name of a shipped search space, or a path."""
    from rayfed_lora.tuning.space import shipped_spaces

    return [name for name in shipped_spaces() if name.startswith(incomplete)] + paths(incomplete)


def paths(incomplete: str) -> list[str]:
    """Complete a path."""
    return sorted(glob.glob(f"{glob.escape(incomplete)}*"))
