"""Which values of a recipe's `model.config` a model fails for. Source: this project."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.recipe.model import Model

R = TypeVar("R")
# Entries of a configuration that follow from data and tokenizer.
_FROM_DATA = (
    *("num_labels", "id2label", "label2id", "problem_type", "image_size", "num_channels"),
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"),
)


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
    # `data.max_length` of own models for texts.
    known = (*_FROM_DATA, *(() if model.own is None else ("max_position_embeddings",)))
    facts = {name: getattr(config, name) for name in known if hasattr(config, name)}
    found = {}
    for key in model.config:
        if key == "architecture":
            continue
        others = {k: value for k, value in model.config.items() if k != key}
        # Usual images are larger than those of small data: a patch of 1 always fits.
        for changed in (others, {**others, key: 1}):
            with suppress(Exception):  # of many types: with this value, too, it fails
                own = model.model_copy(update={"config": changed})
                given = {name: value for name, value in facts.items() if name != key}
                fitting = base_models.configuration(own, given)
                attempt(fitting)
                found[key] = getattr(fitting, key)
                break
    return found
