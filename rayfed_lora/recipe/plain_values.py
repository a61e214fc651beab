"""Plain nested values, as YAML and JSON hold them: made, limited, merged, compared, walked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np
from pydantic import BaseModel

MOST_LEVELS = 32
# A YAML alias counts each time it is used.
MOST_VALUES = 100_000
_LARGEST = 2**63 - 1


def plain(given: Any) -> Any:
    """Return nested values as a file would hold them.

    Sections become mappings of the keys that were set, paths texts, tuples and arrays lists, and
    numbers of numpy Python's own. Other objects are kept; the validation rejects them.

    >>> from pathlib import Path
    >>> plain({"ranks": (np.int64(4), 8), "path": Path("runs/a")})
    {'ranks': [4, 8], 'path': 'runs/a'}
    """
    if isinstance(given, BaseModel):
        return plain({k: v for k, v in _held(given).items() if k in given.model_fields_set})
    if isinstance(given, Mapping):
        return {plain(key): plain(value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [plain(value) for value in given]
    if isinstance(given, (np.generic, np.ndarray)):
        return given.tolist()
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def values_of(section: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Return all values of a section as nested mappings.

    Includes values that a changed copy holds under names that are no fields: the validation
    rejects them.
    """
    held = _held(section) if isinstance(section, BaseModel) else section
    return {k: values_of(v) if isinstance(v, BaseModel) else v for k, v in held.items()}


def _held(section: BaseModel) -> Mapping[str, Any]:
    return {**vars(section), **(section.model_extra or {})}


def excess(value: Any) -> str | None:
    """Return the limit that a document of any objects exceeds; it may contain itself.

    >>> excess({"seed": 2**64})
    'expected numbers of at most 64 bits'
    """
    left = MOST_VALUES
    waiting = [(value, 0)]
    while waiting:
        found, level = waiting.pop()
        left -= 1
        if level > MOST_LEVELS:
            return f"expected at most {MOST_LEVELS} levels of lists and mappings"
        if isinstance(found, int) and abs(found) > _LARGEST:
            return "expected numbers of at most 64 bits"
        inside = list(_inside(found))
        left -= len(inside)
        if left < 0:
            return f"expected at most {MOST_VALUES:,} values"
        waiting += [(item, level + 1) for item in inside]
    return None


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value


def unsupported(value: Any) -> str | None:
    """Return the first value of a document that YAML and JSON cannot both hold, None if none.

    >>> unsupported({"a": [1, 2.5, "x", None]})
    >>> unsupported({"a": [float("nan")]})
    'nan'
    """
    if isinstance(value, (Mapping, list)):
        return next((s for item in _inside(value) if (s := unsupported(item))), None)
    if isinstance(value, str):
        lone_surrogates = any("\ud800" <= character <= "\udfff" for character in value)
        return ascii(value) if lone_surrogates else None
    if isinstance(value, float):
        return None if math.isfinite(value) else repr(value)
    return None if value is None or isinstance(value, int) else f"a {type(value).__name__}"


def is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a mapping whose keys are names.

    Other mappings, such as ranks with their shares, are values.
    """
    return isinstance(value, Mapping) and all(str(key).isidentifier() for key in value)


def value_at(values: Any, *path: str) -> Any:
    """Return the value at a key path, None where there is none.

    >>> value_at({"model": {"task": "causal-lm"}}, "model", "task")
    'causal-lm'
    """
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the deep merge of two mappings; values of `over` win.

    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if is_section(value) and is_section(below):
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `now` that differ from those of `before`.

    >>> changes({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"x": 1, "y": 4}, "b": 3})
    {'a': {'y': 4}}
    """
    changed: dict[str, Any] = {}
    for key, value in now.items():
        old = before.get(key)
        if is_section(value) and is_section(old):
            inner = changes(old, value)
            changed |= {key: inner} if inner else {}
        elif key not in before or old != value:
            changed[key] = value
    return changed


def key_paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key path of every value.

    >>> list(key_paths({"seed": 1, "clients": {"ranks": {4: 0.5}}}))
    ['seed', 'clients.ranks']
    """
    for key, value in values.items():
        if is_section(value) and value:
            yield from key_paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
