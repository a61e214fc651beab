"""Recipes from files, mappings and Python, with presets and `--set`.

Layers, each winning over the one before: defaults, the preset of the recipe's `method`, the
recipe's own keys, the preset of a `method` named by `--set`, the other `--set` values.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rayfed_lora.endpoints import named_in
from rayfed_lora.errors import Fault, RecipeError
from rayfed_lora.plugins.modules import missing, permit
from rayfed_lora.plugins.registry import KEYS, TABLES
from rayfed_lora.recipe.faults import closest, fields_of, known_keys, validated
from rayfed_lora.recipe.plain_values import (
    MOST_LEVELS,
    changes,
    is_section,
    key_paths,
    merged,
    plain,
    value_at,
    values_of,
)
from rayfed_lora.recipe.presets import method_of, preset, task_defaults
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import check_size, parse_yaml, read_text, yaml_text

_SHIPPED = resources.files("rayfed_lora") / "recipe" / "shipped"


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    variant: Mapping[str, Any] | None = None,
    *,
    endpoints: Collection[str] | None = None,
    plugins: Sequence[Any] = (),
) -> Recipe:
    """Return the validated recipe.

    Args:
        source: a shipped recipe's name, a path to a YAML file, the mapping itself, or a recipe: its
            values are checked again, since a copy may have been changed. A copy that names another
            method than it was made for gets that method's preset.
        overrides: `key.path=value` texts (values in YAML) or a mapping of key paths to values.
        variant: the values by key path that distinguish one variant of that recipe. A method that
            it names brings its preset, which wins over `source` and `overrides`.
        endpoints: of object stores, named by the user: requests to them carry credentials. None:
            those of `overrides`, of `variant`, and of a `Recipe`; never those of a file or mapping.
        plugins: own methods that may be used: names of modules, modules, and methods decorated by
            `rayfed_lora.plugins`; one with options, or an instance, is chosen too. Nothing else
            that a recipe names is imported.

    Raises:
        PluginError: a plug-in cannot be imported.
        RecipeError: the file cannot be read, is not YAML, or has faults; all are listed.
    """
    name, raw = _read(source)
    check_size(name, raw)
    raw = given = plain(raw)
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = override_pairs(name, overrides)
    modules, chosen = permit(plugins)
    settings, own = _nested(name, pairs), _nested(name, (variant or {}).items())
    settings = merged(_nested(name, chosen.items()), settings)
    changed: dict[str, Any] = {}
    if endpoints is None:
        endpoints = named_in(settings) | named_in(own)
        endpoints |= named_in(raw) if isinstance(source, Recipe) else frozenset()
    if isinstance(source, Recipe) and source.preset != source.method:
        # `model.config` has no preset, and may have lost keys: it is taken as it is.
        made = {**source.made, "model": raw["model"]}
        changed = changes(made, raw)
        raw = _layered(made, changed)
    if variant is None:
        content = _layered(raw, settings)
    else:
        # The preset of a method that stays may depend on the variant: it is applied below it.
        raw = merged(raw, settings) if _keeps_method(raw, settings) else _layered(raw, settings)
        content = _layered(raw, own)
    content = _without_old_options(raw, _with_modules(name, content, modules))
    recipe = validated(name, merged(task_defaults(content), content), endpoints)
    asked = frozenset([*(path for path, _ in pairs), *(variant or {}), *key_paths(changed)])
    own_method = source.preset if isinstance(source, Recipe) else method_of(given)
    overruled = source.overruled if isinstance(source, Recipe) else ()
    if recipe.method != own_method:
        if variant is not None:
            overruled = (*overruled, *_overruled(recipe, settings))
        return recipe.with_provenance(asked, overruled)
    if isinstance(source, Recipe):
        known = source.asked
    else:
        known = frozenset() if _is_resolved(given) else None
    return recipe.with_provenance(None if known is None else asked | known, overruled)


def recipe_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
    return yaml_text(recipe.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for completion in editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def shipped_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = (Path(item.name) for item in _SHIPPED.iterdir())
    return sorted(file.stem for file in files if file.suffix == ".yaml")


def shipped_text(name: str) -> str:
    """Return the YAML text of a shipped recipe.

    Raises:
        RecipeError: no recipe of that name is shipped.
    """
    names = shipped_names()
    if name not in names:
        expected = f"a shipped recipe ({', '.join(names)}) or a path"
        raise RecipeError(name, [Fault("RECIPE", expected, repr(name), closest(name, names))])
    return (_SHIPPED / f"{name}.yaml").read_text("utf-8")


def override_pairs(name: str, overrides: Iterable[str]) -> list[tuple[str, Any]]:
    """Return the key paths and values of `key.path=value` texts, values read as YAML.

    Raises:
        RecipeError: a text has no `=`, or its value is not YAML.
    """
    pairs = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise RecipeError(name, [Fault("--set", "expected key.path=value", repr(text))])
        pairs.append((path.strip(), parse_yaml(name, value, f"--set {path.strip()}")))
    return pairs


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[str, dict[str, Any]]:
    """Return a name for errors, and the nested values."""
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
        fault = Fault("RECIPE", "a readable YAML file", f"{path}: {error}", _nearest(path))
        raise RecipeError(str(source), [fault]) from None
    raw = parse_yaml(str(source), text)
    if not isinstance(raw, dict):
        fault = Fault("(file)", "expected a mapping of recipe keys", type(raw).__name__)
        raise RecipeError(str(source), [fault])
    return str(source), raw


def _nearest(path: Path) -> str | None:
    """Return the recipe that was meant: in the folder `path`, or of a similar name beside it."""
    # `pathlib` raises for names that are too long.
    if os.path.isdir(path):
        inside = path / "recipe.yaml"
        return str(inside) if inside.exists() else None
    found = closest(path.name, [each.name for each in path.parent.glob("*.y*ml")])
    return None if found is None else str(path.parent / found)


def _nested(name: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return values by key path as nested mappings; a later pair wins."""
    result: dict[str, Any] = {}
    for path, value in pairs:
        check_size(name, value, f"--set {path}")
        keys = path.split(".")
        if not all(keys) or len(keys) > MOST_LEVELS:
            raise RecipeError(name, [Fault("--set", "expected key.path=value", repr(path))])
        inner = plain(value)
        for key in reversed(keys):
            inner = {key: inner}
        result = merged(result, inner)
    return result


def _with_modules(name: str, content: dict[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return a recipe that names the allowed modules; raises RecipeError where it names others."""
    named = content.get("plugins", [])
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        return content  # a fault, found by the validation
    wanted = [*dict.fromkeys([*named, *modules])]
    lacking = missing(wanted)
    if lacking:
        expected = (
            "the recipe asks for code that is not allowed here; expected each module to be allowed"
            " by --plugins NAME, or run(plugins=[NAME])"
        )
        raise RecipeError(name, [Fault("plugins", expected, ", ".join(lacking))])
    return {**content, "plugins": wanted} if wanted else content


def _without_old_options(before: Mapping[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without options of methods that others have replaced since `before`.

    A resolved recipe holds the options of its methods as if the user had written them.
    """
    for kind, key in KEYS.items():
        *section, choice = key.split(".")
        old, new = value_at(before, *section), value_at(content, *section)
        if kind not in TABLES or not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        names, table = (old.get(choice), new.get(choice)), TABLES[kind]
        if names[0] == names[1]:
            continue
        # A source of data may be a file in place of a method.
        gone, kept = (
            set(table.method(n).options.model_fields)
            if isinstance(n, str) and n in table
            else set()
            for n in names
        )
        gone = gone - kept - set(known_keys(section))
        stale = {option for option in gone if option in old and new.get(option) == old[option]}
        inner: Any = {option: value for option, value in new.items() if option not in stale}
        for part in reversed(section[1:]):
            inner = {part: inner}
        content = {**content, section[0]: _replaced(content[section[0]], section[1:], inner)}
    return content


def _replaced(values: Any, path: Sequence[str], inner: Any) -> Any:
    """Return nested values with those at `path` replaced; `inner` is nested likewise."""
    if not path:
        return inner
    return {**values, path[0]: _replaced(values[path[0]], path[1:], inner[path[0]])}


def _keeps_method(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    own = method_of(raw)
    return bool(settings.get("method", own) == own)


def _layered(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the preset of its method, and settings over both.

    A recipe's own keys win over the preset of its method; the preset of another method that
    `settings` name wins over them.
    """
    own = method_of(raw)
    if _keeps_method(raw, settings):
        under = merged(preset(own, merged(raw, settings)), raw)
    else:
        # A resolved recipe holds the values of its own preset as if the user had written them.
        rest = changes(preset(own, raw), raw)
        if value_at(rest, "annealing", "initiating", "trainable") == "none":
            rest = merged(rest, {"annealing": {"initiating": {"rounds": 0}}})
        under = merged(rest, preset(settings["method"], merged(rest, settings)))
    return merged(under, settings)


def _is_resolved(raw: Any, kind: Any = Recipe) -> bool:
    """Return whether every key of a recipe is written, as `recipe_yaml` does."""
    fields = fields_of(kind)
    if fields is None or raw is None:
        return True
    return isinstance(raw, Mapping) and all(
        key in raw and _is_resolved(raw[key], inner) for key, inner in fields.items()
    )


def _overruled(recipe: Recipe, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each setting that the preset of a variant's method overrules."""
    values = values_of(recipe)
    for path in key_paths(settings):
        keys = path.split(".")
        value, found = value_at(settings, *keys), value_at(values, *keys)
        if not is_section(found) and path != "method" and found != value:
            yield f"{path}: {value} of --set gives way to the preset of {recipe.method}: {found}"
