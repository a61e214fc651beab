"""What makes a recipe of what was written: plain values, presets, and guarded locations.

Every `Recipe` passes here, whether it comes from a file, a mapping, or Python's own call.

Source: this project.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

from rayfed_lora.endpoints import guarded_in
from rayfed_lora.recipe.plain_values import excess
from rayfed_lora.recipe.presets import is_section, merged, preset


def plain(given: Any) -> Any:
    """Return nested values as a file would hold them.

    Sections become mappings of the keys that were set, paths texts, tuples and arrays lists, and
    numbers of numpy Python's own. Anything else stays as it is, and is found by the validation.

    >>> from pathlib import Path
    >>> plain({"ranks": (np.int64(4), 8), "path": Path("runs/a")})
    {'ranks': [4, 8], 'path': 'runs/a'}
    """
    if isinstance(given, BaseModel):
        return plain({k: v for k, v in vars(given).items() if k in given.model_fields_set})
    if isinstance(given, Mapping):
        return {plain(key): plain(value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [plain(value) for value in given]
    if isinstance(given, (np.generic, np.ndarray)):
        return given.tolist()
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def values_of(section: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of a section, or of what it holds by name, as nested mappings.

    Those too that a changed copy has under names that are no fields: the validation refuses them.
    """
    held = vars(section) if isinstance(section, BaseModel) else section
    return {k: values_of(v) if isinstance(v, BaseModel) else v for k, v in held.items()}


def changes_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some nested values that are others than before.

    >>> changes_of({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 1, "y": 4}, "b": 3})
    {'a': {'y': 4}}
    """
    changed: dict[str, Any] = {}
    for key, value in now.items():
        old = before.get(key)
        if is_section(value) and is_section(old):
            inner = changes_of(old, value)
            changed |= {key: inner} if inner else {}
        elif key not in before or old != value:
            changed[key] = value
    return changed


def filled(given: Mapping[str, Any], endpoints: Collection[str] = ()) -> dict[str, Any]:
    """Return a recipe's values with what its method's preset and its task fill in.

    Filling in twice is filling in once: a key that is there wins.

    Args:
        given: what was written.
        endpoints: of object stores that the user has named elsewhere; see `endpoints`.

    Raises:
        ValueError: there is too much of it.
    """
    found = excess(given)
    if found is not None:
        raise ValueError(found)
    written: dict[str, Any] = plain(given)
    content = merged(preset(method_of(written), written), written)
    return guarded_in(merged(of_task(content), content), endpoints)


def method_of(raw: Mapping[str, Any]) -> Any:
    """Return the method that a recipe is written for."""
    return raw.get("method", "sa-fedlora")


def of_task(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults that a task has of its own."""
    model = raw.get("model")
    language = isinstance(model, Mapping) and model.get("task") == "causal-lm"
    return {"adapter": {"train_head": False}} if language else {}
