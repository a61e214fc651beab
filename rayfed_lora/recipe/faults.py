"""Validation of a recipe's values, with one error that lists every fault."""

from __future__ import annotations

import difflib
import json
import typing
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from rayfed_lora.errors import Fault, RecipeError
from rayfed_lora.recipe.checks import ConflictError
from rayfed_lora.recipe.fields import ENDPOINTS, MEMBERS
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import MOST_SHOWN, shortened

_MAX_PASSES = 8
# The error lists at most this many faults of one pass.
_MOST_FAULTS = 100


def validated(name: str, raw: dict[str, Any], endpoints: Collection[str]) -> Recipe:
    """Return the recipe of some values.

    Faulty values are dropped and the rest is validated again, so that faults hidden behind others
    are found too. `endpoints` are those of object stores that the user has named.

    Raises:
        RecipeError: the values have faults; all are listed.
    """
    faults: list[Fault] = []
    rest = raw
    for _ in range(_MAX_PASSES):
        try:
            recipe = Recipe.model_validate(rest, context={ENDPOINTS: endpoints})
        except ValidationError as error:
            meant = [fault.nearest for fault in faults if fault.nearest and fault.came is None]
            conflicts = _conflicts(error, [*meant, *(fault.path for fault in faults)])
            if conflicts is not None:
                faults += conflicts
                break
            known = {fault.path for fault in faults}
            for path, entries in _by_path(error).items():
                fault = _fault(path, entries)
                faults += [] if fault.path in known else [fault]
                rest = _without(rest, path)
        else:
            if not faults:
                return recipe
            break
    raise RecipeError(name, faults)


def fields_of(node: Any) -> dict[str, Any] | None:
    """Return the annotations of a section's keys, None where `node` is not a section's type."""
    # The location of an optional section does not name the union's member.
    members = [member for member in typing.get_args(node) if member is not type(None)]
    node = members[0] if len(members) == 1 else node
    if isinstance(node, type) and issubclass(node, BaseModel):
        return {key: info.annotation for key, info in node.model_fields.items()}
    return None


def _fields_beside_a_number(node: Any) -> dict[str, Any] | None:
    """Return the annotations of a section's keys where a number may stand in its place."""
    for member in typing.get_args(node):
        found = fields_of(member) or _fields_beside_a_number(member)
        if found is not None:
            return found
    return None


def closest(word: str, known: Sequence[str], cutoff: float = 0.5) -> str | None:
    """Return the known word most similar to a given one, None where none is similar."""
    if len(word) > MOST_SHOWN:
        return None
    matches = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def _conflicts(error: ValidationError, faulty: Sequence[str]) -> list[Fault] | None:
    """Return the conflicts that involve no faulty value; None where the error lists none."""
    cause = error.errors()[0].get("ctx", {}).get("error")
    if not isinstance(cause, ConflictError):
        return None
    return [
        Fault(conflict.paths[0], conflict.message)
        for conflict in cause.conflicts
        if not any(_overlap(path, fault) for path in conflict.paths for fault in faulty)
    ]


def _overlap(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _by_path(error: ValidationError) -> dict[tuple[str, ...], list[Any]]:
    """Return the errors that pydantic lists, by key path: a union has one a member."""
    entries: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for entry in error.errors()[:_MOST_FAULTS]:
        entries[_location(entry["loc"])].append(entry)
    return entries


def _fault(path: tuple[str, ...], entries: Sequence[Any]) -> Fault:
    dotted = ".".join(path) or "recipe"
    first = entries[0]
    if first["type"] == "extra_forbidden":
        siblings = known_keys(path[:-1])
        expected = f"unknown key; known here: {', '.join(siblings)}"
        return Fault(dotted, expected, None, _nearest_key(path, siblings))
    if first["type"] == "unknown_option":
        known = list(first["ctx"]["known"])
        near = closest(path[-1], known)
        nearest = None if near is None else ".".join((*path[:-1], near))
        return Fault(dotted, f"unknown key; known here: {', '.join(known)}", None, nearest)
    if first["type"] == "missing":
        return Fault(dotted, "this key is required, and is missing")
    expected = " or ".join(dict.fromkeys(_expectation(e) for e in entries))
    value = first["input"]
    nearest = None
    if isinstance(value, str):
        nearest = closest(value, [name for e in entries for name in _literal_values(e)])
    return Fault(dotted, expected, shortened(json.dumps(value, default=repr)), nearest)


def _expectation(entry: Any) -> str:
    if entry["type"] == "model_type":
        return "expected a mapping of its keys"
    message = str(entry["msg"])
    return message.replace("Input should be", "expected").replace("Input should", "expected to")


def _literal_values(entry: Any) -> list[str]:
    expected = str(entry.get("ctx", {}).get("expected", ""))
    parts = [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]
    return [part for part in parts if part]


def _location(loc: Sequence[int | str]) -> tuple[str, ...]:
    """Return the key path of a pydantic location, without its names of union members."""
    path: list[str] = []
    node: Any = Recipe
    for part in loc:
        fields = fields_of(node) or _fields_beside_a_number(node)
        if fields is not None and part in MEMBERS:
            continue
        if fields is None or not isinstance(part, str):
            break
        path.append(part)
        # An option of a method has no section below it.
        node = fields.get(part)
    return tuple(path)


def known_keys(path: Sequence[str]) -> list[str]:
    """Return the keys of the section at a path, without options of methods."""
    fields = fields_of(Recipe) or {}
    for part in path:
        node = fields.get(part)
        fields = fields_of(node) or _fields_beside_a_number(node) or {}
    return list(fields)


def _all_paths(node: Any = Recipe, prefix: str = "") -> list[str]:
    paths = []
    for key, kind in (fields_of(node) or {}).items():
        paths.append(f"{prefix}{key}")
        paths += _all_paths(kind, f"{prefix}{key}.")
    return paths


def _nearest_key(path: tuple[str, ...], siblings: list[str]) -> str | None:
    """Return the known key meant: the only one of that name, one beside it, or the closest."""
    same_name = [p for p in _all_paths() if p.rsplit(".", 1)[-1] == path[-1]]
    if len(same_name) == 1:
        return same_name[0]
    here = closest(path[-1], siblings)
    if here is not None:
        return ".".join((*path[:-1], here))
    if same_name:
        return max(same_name, key=lambda p: p.split(".")[: len(path) - 1] == list(path[:-1]))
    written = ".".join(path)
    return closest(written, [p for p in _all_paths() if not written.startswith(f"{p}.")], 0.75)


def _without(raw: Any, path: tuple[str, ...]) -> Any:
    """Return `raw` without the value at `path`; a valid model in place of a faulty one."""
    if not isinstance(raw, Mapping) or not path:
        return raw
    head, *tail = path
    if head == "model" and not tail:
        return {**raw, "model": {"config": {"architecture": "vit"}}}
    if not tail:
        return {k: v for k, v in raw.items() if k != head}
    return {k: _without(v, tuple(tail)) if k == head else v for k, v in raw.items()}
