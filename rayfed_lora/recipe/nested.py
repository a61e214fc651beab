"""Nested mappings of keys: merged, compared, walked. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard


def is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a mapping whose keys are names.

    Other mappings, such as ranks with their shares, are values.
    """
    return isinstance(value, Mapping) and all(str(key).isidentifier() for key in value)


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


def without(values: Mapping[str, Any], removed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without those that are equal in `removed`.

    >>> without({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 3}})
    {'a': {'y': 2}}
    """
    rest = dict(values)
    for key, value in removed.items():
        if isinstance(value, Mapping) and isinstance(rest.get(key), Mapping):
            rest[key] = without(rest[key], value)
        elif key in rest and rest[key] == value:
            del rest[key]
    return rest


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
