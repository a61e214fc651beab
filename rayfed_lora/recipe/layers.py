"""The layers of a recipe: `--set` values, and presets under and over its own keys.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rayfed_lora.errors import Fault, RecipeError
from rayfed_lora.recipe.nested import merged, without
from rayfed_lora.recipe.plain_values import MOST_LEVELS, plain
from rayfed_lora.recipe.presets import method_of, preset
from rayfed_lora.recipe.yaml_text import check_size, parse_yaml


def override_pairs(name: str, overrides: Iterable[str]) -> list[tuple[str, Any]]:
    """Return the key paths and values of `key.path=value` texts, values read as YAML.

    Args:
        name: of the recipe, for the error.
        overrides: the texts.

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


def nested(name: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return values by key path as nested mappings.

    Args:
        name: of the recipe, for the error.
        pairs: key path and value; a later pair wins.

    Raises:
        RecipeError: a path has an empty key, or a path or value exceeds a limit.
    """
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


def keeps_method(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether settings leave a recipe's method as it is."""
    own = method_of(raw)
    return bool(settings.get("method", own) == own)


def layered(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the preset of its method, and settings over both.

    A recipe's own keys win over the preset of its method; the preset of another method that
    `settings` name wins over them.
    """
    own = method_of(raw)
    if keeps_method(raw, settings):
        under = merged(preset(own, merged(raw, settings)), raw)
    else:
        # A resolved recipe holds the values of its own preset as if the user had written them.
        rest = without(raw, preset(own, raw))
        if _skips_initiating(rest):
            rest = merged(rest, {"annealing": {"initiating": {"rounds": 0}}})
        under = merged(rest, preset(settings["method"], merged(rest, settings)))
    return merged(under, settings)


def _skips_initiating(raw: Mapping[str, Any]) -> bool:
    """Return whether a recipe skips its first stage, however many rounds it names."""
    stage: Any = raw
    for key in ("annealing", "initiating"):
        stage = stage.get(key) if isinstance(stage, Mapping) else None
    return isinstance(stage, Mapping) and stage.get("trainable") == "none"
