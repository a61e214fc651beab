"""Which values of a recipe's `model.config` a model fails for. Source: this project."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.recipe.model import Model

R = TypeVar("R")


def tried(model: Model, config: Any, attempt: Callable[[Any], R]) -> R:
    """Return `attempt(config)`; where it fails, name the values of the recipe that it fails for.

    Each key of `model.config` gets its usual value (the source's, or the default of the
    architecture), or 1, in turn; it is named if the attempt then succeeds.

    Raises:
        ModelError: the attempt raised it.
    """
    try:
        return attempt(config)
    except ModelError as error:
        found = _causes(model, config, attempt)
        if not found:
            raise
        keys = " or ".join(f"model.config.{key}" for key in found)
        fitting = " or ".join(f"{key} {value!r}" for key, value in found.items())
        came = ", ".join(f"{key} {model.config[key]!r}" for key in found)
        reason = str(error).removeprefix("model.config: ")
        raise ModelError(
            f"{keys}: expected a value that fits the data and the other keys, such as {fitting},"
            f" got {came}; {reason}"
        ) from error


def _causes(model: Model, config: Any, attempt: Callable[[Any], object]) -> dict[str, Any]:
    """Return the keys of which another value lets the attempt succeed, each with that value."""
    if model.source == "config":
        usual = type(config)().to_dict()
    else:
        plain = model.model_copy(update={"config": {}})
        usual = base_models.configuration(plain, {}).to_dict()
    values, found = config.to_dict(), {}
    for key in model.config:
        name = config.attribute_map.get(key, key)
        if name not in usual:
            continue
        # Usual images are larger than those of small data: a patch of 1 always fits.
        others = [usual[name], *([1] if isinstance(usual[name], int) else [])]
        for other in others:
            with suppress(Exception):  # of many types: with this value, too, it fails
                attempt(base_models.restored({**values, name: other}))
                found[key] = other
                break
    return found
