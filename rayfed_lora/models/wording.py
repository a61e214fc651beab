"""Parts of messages about models. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence

from rayfed_lora.recipe.model import Model


def where(model: Model) -> str:
    """Return the recipe's key, with its value, that a model comes from."""
    return "model.config" if model.source == "config" else f"model.source {model.source!r}"


def one_line(error: BaseException) -> str:
    """Return an error of a library with its type, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first `most` names and the number of the others.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
