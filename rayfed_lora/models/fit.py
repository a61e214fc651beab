"""Whether the weights of a source fit the model that they are loaded into.

Source: this project, on the loading report of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.loading import Loading, listed
from rayfed_lora.models.shapes import head_modules, head_parameters
from rayfed_lora.recipe.recipe import Recipe

# Counters and positions that are the same in every model; a mask token is for pre-training only.
_HARMLESS = ("num_batches_tracked", "position_ids", "mask_token")


def fit_notes(net: nn.Module, loading: Loading, recipe: Recipe) -> tuple[str, ...]:
    """Return what the user should know of how the source's weights fit the model.

    New weights are accepted for the head and for poolers, which many sources lack; a language
    model has no such parts.

    Args:
        net: the model, real or on the meta device.
        loading: what transformers reports of the source.
        recipe: the run.

    Raises:
        ModelError: tensors are missing elsewhere, or have another size.
    """
    where = f"model.source {recipe.model.source!r}"
    fresh = _may_be_new(net, recipe)
    missing = [name for name in loading.missing if not name.endswith(_HARMLESS)]
    lost = [name for name in missing if not fresh(name)]
    if lost:
        hint = f"; not used are {_grouped(loading.unexpected)}" if loading.unexpected else ""
        raise ModelError(
            f"{where}: expected the weights of a {type(net).__name__}, {_count(lost)} missing:"
            f" {listed(lost)}{hint}; is it a model of this architecture, and are its tensors named"
            " as transformers names them?"
        )
    wrong = {name: sizes for name, sizes in loading.mismatched.items() if not fresh(name)}
    if wrong:
        told = [f"{name} ({had}, expected {needed})" for name, (had, needed) in wrong.items()]
        raise ModelError(
            f"{where}: expected tensors of the configuration's sizes, {_count(told)} of another"
            f" size: {listed(told)}; check model.config"
        )
    return tuple(_notes(net, loading, missing, recipe))


def _notes(
    net: nn.Module, loading: Loading, missing: Sequence[str], recipe: Recipe
) -> Iterable[str]:
    where = f"model.source {recipe.model.source!r}"
    trained = set(head_parameters(net, recipe.adapter))
    unused = [name for name in loading.unexpected if not name.endswith(_HARMLESS)]
    # A source without a head is as usual; one whose head is not recognised is not.
    usual = trained & {name for name in missing if name.startswith(_heads(net, recipe))}
    told = missing if unused else [name for name in missing if name not in usual]
    if told:
        yield f"{where} has no weights for {_grouped(told)}: drawn at random"
    if loading.mismatched:
        first, (had, needed) = next(iter(loading.mismatched.items()))
        yield (
            f"{where}: {_grouped(loading.mismatched)} of another size ({first}: {had}, here"
            f" {needed}): drawn at random"
        )
    annealing = recipe.annealing
    everything = annealing.mode == "full" or (
        annealing.initiating_rounds > 0 and annealing.initiating.trainable == "full"
    )
    frozen = [name for name in (*missing, *loading.mismatched) if name not in trained]
    if frozen and not everything:
        yield (
            f"{_grouped(frozen)}: random weights that no client trains; name the module in"
            " adapter.head_modules to train it"
        )
    if unused:
        yield f"{where}: tensors that the model does not know are not used: {_grouped(unused)}"


def _may_be_new(net: nn.Module, recipe: Recipe) -> Any:
    """Return whether a tensor's weights may be new ones."""
    if recipe.model.task == "causal-lm":
        return lambda name: False
    own = tuple(f"{name}." for name in head_modules(net, recipe.adapter))
    prefixes = (*_heads(net, recipe), *own)
    return lambda name: name.startswith(prefixes) or "pooler" in name


def _heads(net: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """Return how names begin of tensors beside the encoder; a language model has no head."""
    if recipe.model.task == "causal-lm":
        return ()
    automatic = recipe.adapter.model_copy(update={"head_modules": "auto"})
    return tuple(f"{name}." for name in head_modules(net, automatic))


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) != 1 else ' is'}"


def _grouped(names: Iterable[str]) -> str:
    """Return modules with the number of their tensors: `classifier (2), bert.pooler (2)`."""
    groups: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        group = ".".join(parts[: min(2, max(1, len(parts) - 1))])
        groups[group] = groups.get(group, 0) + 1
    return listed([f"{group} ({count})" for group, count in groups.items()])
