"""Recipes from YAML, presets and `--set`, with one error that lists every fault.

Layers, each winning over the one before: defaults, the preset of the recipe's `method`, the
recipe's own keys, the preset of a `method` named by `--set`, the other `--set` values.

Source: this project.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from rayfed_lora.endpoints import named_in
from rayfed_lora.errors import Fault, RecipeError
from rayfed_lora.recipe.checks import ConflictError
from rayfed_lora.recipe.fields import ENDPOINTS
from rayfed_lora.recipe.filling import changes_of, method_of, of_task, plain, values_of
from rayfed_lora.recipe.plain_values import MOST_LEVELS, excess
from rayfed_lora.recipe.presets import is_section, merged, preset
from rayfed_lora.recipe.recipe import Recipe

_MAX_PASSES = 8
_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
# A list of ranks may be long; who writes more than that wants to harm.
_MOST_CHARACTERS = 1 << 20
_MOST_SHOWN = 400
# More faults in one section are not looked at: who is to read them?
_MOST_FAULTS = 100


def shipped_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("rayfed_lora") / "recipe" / "shipped"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def shipped_text(name: str) -> str:
    """Return the YAML text of a shipped recipe.

    Raises:
        RecipeError: no recipe of that name is shipped.
    """
    if name not in shipped_names():
        known = ", ".join(shipped_names())
        fault = Fault("RECIPE", f"a shipped recipe ({known}) or a path", repr(name), _nearest(name))
        raise RecipeError(name, [fault])
    return (resources.files("rayfed_lora") / "recipe" / "shipped" / f"{name}.yaml").read_text(
        "utf-8"
    )


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    variant: Mapping[str, Any] | None = None,
    *,
    endpoints: Collection[str] | None = None,
) -> Recipe:
    """Return the validated recipe.

    Args:
        source: a shipped recipe's name, a path to a YAML file, the mapping itself, or a recipe: its
            values are checked again, since a copy may have been changed. A copy that names another
            method than it was made for gets that one's preset.
        overrides: `key.path=value` texts (values in YAML) or a mapping of key paths to values.
        variant: what sets one variant of that recipe apart, by key path. A method that it names
            brings its preset, which goes over what `source` and `overrides` say.
        endpoints: of object stores, named by the user: they get credentials. None: those of
            `overrides`, of `variant`, and of a `Recipe`; never those of a file or mapping.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or has faults; all are listed.
    """
    name, raw = _read(source)
    _check_size(name, raw)
    raw = first = plain(raw)
    given = overrides.items() if isinstance(overrides, Mapping) else override_pairs(name, overrides)
    pairs = list(given)
    written = settings = _nested_all(name, pairs)
    changes: dict[str, Any] = {}
    own = _nested_all(name, (variant or {}).items())
    if endpoints is None:
        endpoints = named_in(written) | named_in(own)
        endpoints |= named_in(raw) if isinstance(source, Recipe) else frozenset()
    if isinstance(source, Recipe) and source.preset != source.method:
        # The configuration is no preset's, and may have lost keys: it is taken as it is.
        made = {**source.made, "model": raw["model"]}
        changes = changes_of(made, raw)
        raw = _layered(made, changes)
    if variant is not None:
        # The preset of a method that stays may depend on what the variant says: it comes below.
        raw = merged(raw, written) if _keeps_method(raw, written) else _layered(raw, written)
        written = own
    content = _layered(raw, written)
    recipe = _validated(name, merged(of_task(content), content), endpoints)
    asked = frozenset([*(path for path, _ in pairs), *(variant or {}), *_paths(changes)])
    own_method = source.preset if isinstance(source, Recipe) else method_of(first)
    told = source.overruled if isinstance(source, Recipe) else ()
    if recipe.method != own_method:
        told = (*told, *_overruled(recipe, settings)) if variant is not None else told
        return recipe.told(asked, told)
    if isinstance(source, Recipe):
        known = source.asked
    else:
        known = frozenset() if _is_resolved(first) else None
    return recipe.told(None if known is None else asked | known, told)


def _is_resolved(raw: Any, kind: Any = Recipe) -> bool:
    """Return whether every key of a recipe is written, as `recipe_yaml` does."""
    fields = _fields_of(kind)
    return (
        fields is None
        or raw is None
        or (
            isinstance(raw, Mapping)
            and all(key in raw and _is_resolved(raw[key], inner) for key, inner in fields.items())
        )
    )


def _paths(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the key path of every value."""
    for key, value in values.items():
        if is_section(value) and value:
            yield from _paths(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _overruled(recipe: Recipe, settings: Mapping[str, Any]) -> Iterator[str]:
    """Say which settings gave way to the preset of a variant's method."""
    for path in _paths(settings):
        value: Any = settings
        found: Any = recipe
        for key in path.split("."):
            value = value[key]
            found = found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)
        if not isinstance(found, BaseModel) and path != "method" and found != value:
            yield f"{path}: {value} of --set gives way to the preset of {recipe.method}: {found}"


def _nested_all(name: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for path, value in pairs:
        _check_size(name, value, f"--set {path}")
        written = merged(written, _nested(name, path, plain(value)))
    return written


def _keeps_method(raw: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    own = method_of(raw)
    return bool(written.get("method", own) == own)


def _layered(raw: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the preset of its method and what is written over both."""
    own = method_of(raw)
    if _keeps_method(raw, written):
        under = merged(preset(own, merged(raw, written)), raw)
    else:
        # Another method than the recipe was written for: its preset goes over the recipe's keys.
        rest = _freed_of(raw, preset(own, raw))
        if _skips_initiating(rest):
            rest = merged(rest, {"annealing": {"initiating": {"rounds": 0}}})
        under = merged(rest, preset(written["method"], merged(rest, written)))
    return merged(under, written)


def _skips_initiating(raw: Mapping[str, Any]) -> bool:
    """Return whether a recipe's first stage is not run, however many rounds it names."""
    stage: Any = raw
    for key in ("annealing", "initiating"):
        stage = stage.get(key) if isinstance(stage, Mapping) else None
    return isinstance(stage, Mapping) and stage.get("trainable") == "none"


def recipe_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
    return yaml_text(recipe.model_dump(mode="json"))


def yaml_text(content: Mapping[str, Any]) -> str:
    """Return plain values as YAML."""
    out = StringIO()
    _yaml().dump(content, out)
    return out.getvalue()


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for completion in editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def parse_yaml(name: str, text: str, where: str = "(file)") -> Any:
    """Return a YAML 1.2 document (`1e-3` is a number, `no` is a text).

    Args:
        name: of the recipe, for the error.
        text: the document.
        where: the place that the error names.

    Raises:
        RecipeError: `text` is not YAML.
    """
    if len(text) > _MOST_CHARACTERS:
        expected = f"expected at most {_MOST_CHARACTERS:,} characters of YAML"
        raise RecipeError(name, [Fault(where, expected, f"{len(text):,}")])
    try:
        found = _yaml().load(text)
    except Exception as error:  # the reader's constructors raise errors of many kinds
        problem = _shortened(" ".join(str(error).split()) or type(error).__name__)
        raise RecipeError(name, [Fault(where, "expected YAML", problem)]) from None
    _check_size(name, found, where)
    return found


def read_text(path: Path) -> str:
    """Return a YAML file's text; of one that is too long, a little more than may be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(4 * _MOST_CHARACTERS + 4)
    return codecs.getincrementaldecoder("utf-8")().decode(
        content, len(content) <= 4 * _MOST_CHARACTERS
    )


def _check_size(name: str, value: Any, where: str = "(file)") -> None:
    found = excess(value)
    if found is not None:
        raise RecipeError(name, [Fault(where, found)])


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


class _Representer(SafeRepresenter):
    """Writes texts with line breaks of Unicode's own in quotes, escaped: plain ones lose them."""

    def represent_str(self, data: str) -> Any:
        style = '"' if _BREAKS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    # A key that is folded over two lines cannot be read again.
    yaml.width = 4 * _MOST_CHARACTERS
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Recipe):
        return "recipe", values_of(source)
    if isinstance(source, Mapping):
        return "recipe", dict(source)
    path = Path(source)
    is_path = not isinstance(source, str) or path.suffix in {".yaml", ".yml"}
    try:
        is_name = not is_path and not path.exists()
        text = shipped_text(str(source)) if is_name else read_text(path)
    except (OSError, ValueError) as error:
        fault = Fault("RECIPE", "a readable YAML file", f"{path}: {error}")
        raise RecipeError(str(source), [fault]) from None
    raw = parse_yaml(str(source), text)
    if not isinstance(raw, dict):
        fault = Fault("(file)", "expected a mapping of recipe keys", type(raw).__name__)
        raise RecipeError(str(source), [fault])
    return str(source), raw


def override_pairs(name: str, overrides: Iterable[str]) -> list[tuple[str, Any]]:
    """Return the key paths and values of `key.path=value` texts, values read as YAML.

    Args:
        name: what the errors call the recipe.
        overrides: the texts.

    Raises:
        RecipeError: one has no `=`, or its value is not YAML.
    """
    pairs = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise RecipeError(name, [Fault("--set", "expected key.path=value", repr(text))])
        pairs.append((path.strip(), parse_yaml(name, value, f"--set {path.strip()}")))
    return pairs


def _nested(name: str, path: str, value: Any) -> dict[str, Any]:
    keys = path.split(".")
    if not all(keys) or len(keys) > MOST_LEVELS:
        raise RecipeError(name, [Fault("--set", "expected key.path=value", repr(path))])
    for key in reversed(keys):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def _freed_of(raw: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the values that the preset of its own method gives.

    A resolved recipe holds them as if the user had written them; another method has others.
    """
    rest = dict(raw)
    for key, value in preset.items():
        if isinstance(value, Mapping) and isinstance(rest.get(key), Mapping):
            rest[key] = _freed_of(rest[key], value)
        elif key in rest and rest[key] == value:
            del rest[key]
    return rest


def _validated(name: str, raw: dict[str, Any], endpoints: Collection[str]) -> Recipe:
    """Validate; drop faulty values and go on, so that faults hidden behind others are found too."""
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
            found = _faults(error)
            faults += [f for f in found if f.path not in {seen.path for seen in faults}]
            for location in {_location(e["loc"]) for e in error.errors()[:_MOST_FAULTS]}:
                rest = _without(rest, location)
        else:
            if not faults:
                return recipe
            break
    raise RecipeError(name, faults)


def _conflicts(error: ValidationError, faulty: Sequence[str]) -> list[Fault] | None:
    """Return the conflicts between values, but those that a faulty value takes part in.

    None where the error is not about conflicts.
    """
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


def _faults(error: ValidationError) -> list[Fault]:
    by_path: dict[tuple[str, ...], list[Any]] = {}
    for entry in error.errors()[:_MOST_FAULTS]:
        by_path.setdefault(_location(entry["loc"]), []).append(entry)
    return [_fault(path, entries) for path, entries in by_path.items()]


def _fault(path: tuple[str, ...], entries: Sequence[Any]) -> Fault:
    dotted = ".".join(path) or "recipe"
    first = entries[0]
    if first["type"] == "extra_forbidden":
        siblings = _known_keys(path[:-1])
        expected = f"unknown key; known here: {', '.join(siblings)}"
        return Fault(dotted, expected, None, _nearest_key(path, siblings))
    if first["type"] == "missing":
        return Fault(dotted, "this key is required, and is missing")
    expected = " or ".join(dict.fromkeys(_expectation(e) for e in entries))
    value = first["input"]
    nearest = None
    if isinstance(value, str):
        options = [o for e in entries for o in _literal_values(e)]
        nearest = _close(value, options)
    return Fault(dotted, expected, _shortened(json.dumps(value, default=repr)), nearest)


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
        fields = _fields_of(node)
        if fields is None or not isinstance(part, str):
            break
        path.append(part)
        node = fields.get(part)
    return tuple(path)


def _fields_of(node: Any) -> dict[str, Any] | None:
    # A section that may be null is named by its location as one that may not.
    members = [member for member in typing.get_args(node) if member is not type(None)]
    node = members[0] if len(members) == 1 else node
    if isinstance(node, type) and issubclass(node, BaseModel):
        return {key: info.annotation for key, info in node.model_fields.items()}
    return None


def _known_keys(path: Sequence[str]) -> list[str]:
    node: Any = Recipe
    for part in path:
        node = (_fields_of(node) or {}).get(part)
    return list(_fields_of(node) or {})


def _all_paths(node: Any = Recipe, prefix: str = "") -> list[str]:
    paths = []
    for key, kind in (_fields_of(node) or {}).items():
        paths.append(f"{prefix}{key}")
        paths += _all_paths(kind, f"{prefix}{key}.")
    return paths


def _nearest_key(path: tuple[str, ...], siblings: list[str]) -> str | None:
    """Return the known key meant: one beside it, else one of that name, the closest first."""
    here = _close(path[-1], siblings)
    if here is not None:
        return ".".join((*path[:-1], here))
    same_name = [p for p in _all_paths() if p.rsplit(".", 1)[-1] == path[-1]]
    if same_name:
        return max(same_name, key=lambda p: p.split(".")[: len(path) - 1] == list(path[:-1]))
    written = ".".join(path)
    return _close(written, [p for p in _all_paths() if not written.startswith(f"{p}.")], 0.75)


def _nearest(name: str) -> str | None:
    return _close(name, shipped_names())


def _close(word: str, known: Sequence[str], cutoff: float = 0.5) -> str | None:
    if len(word) > _MOST_SHOWN:
        return None
    matches = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


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
