"""Whether the weights of a source fit the model. Source: this project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.base_weights import LoadReport
from rayfed_lora.models.heads import head_modules, head_parameters
from rayfed_lora.models.wording import listed, where
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.recipe.recipe import Recipe

# Counters and positions are the same in every model; a mask token serves pre-training only.
_HARMLESS = ("num_batches_tracked", "position_ids", "mask_token")


def fit_notes(net: nn.Module, report: LoadReport, recipe: Recipe) -> tuple[str, ...]:
    """Return notes for the user on how the source's weights fit the model.

    Random weights are accepted in the head and in poolers, which many sources lack. A language
    model has neither. `net` may be on the meta device.

    Raises:
        ModelError: tensors are missing elsewhere, or have another shape.
    """
    source, language = where(recipe.model), recipe.model.task == "causal-lm"
    automatic = recipe.adapter.model_copy(update={"head_modules": "auto"})
    heads = () if language else _prefixes(net, automatic)
    may_be_random = () if language else (*heads, *_prefixes(net, recipe.adapter))

    def required(name: str) -> bool:
        return language or not (name.startswith(may_be_random) or "pooler" in name)

    missing = [name for name in report.missing if not name.endswith(_HARMLESS)]
    lost = [name for name in missing if required(name)]
    if lost:
        unused = f"; unused are {_grouped(report.unexpected)}" if report.unexpected else ""
        raise ModelError(
            f"{source}: expected the weights of a {type(net).__name__}, {_count(lost)} missing:"
            f" {listed(lost)}{unused}; is it a model of this architecture, and are its tensors"
            " named as transformers names them?"
        )
    sizes = {name: sizes for name, sizes in report.mismatched.items() if required(name)}
    wrong = [f"{name} ({had}, expected {needed})" for name, (had, needed) in sizes.items()]
    if wrong:
        raise ModelError(
            f"{source}: expected tensors of the configuration's sizes, {_count(wrong)} of another"
            f" size: {listed(wrong)}; check model.config"
        )
    return tuple(_notes(report, missing, heads, set(head_parameters(net, recipe.adapter)), recipe))


def _notes(
    report: LoadReport,
    missing: Sequence[str],
    heads: tuple[str, ...],
    trained: set[str],
    recipe: Recipe,
) -> Iterable[str]:
    """Yield the notes, given prefixes of the head's names and the densely trained parameters."""
    source = where(recipe.model)
    unused = [name for name in report.unexpected if not name.endswith(_HARMLESS)]
    # A source without a head is common; one with a head that is not recognised is not.
    expected = set() if unused else {n for n in missing if n in trained and n.startswith(heads)}
    noted = [name for name in missing if name not in expected]
    if noted:
        yield f"{source} has no weights for {_grouped(noted)}: initialised at random"
    if report.mismatched:
        first, (had, needed) = next(iter(report.mismatched.items()))
        yield (
            f"{source}: {_grouped(report.mismatched)} of another size ({first}: {had}, here"
            f" {needed}): initialised at random"
        )
    annealing = recipe.annealing
    full_rounds = annealing.mode == "full" or (
        annealing.initiating_rounds > 0 and annealing.initiating.trainable == "full"
    )
    frozen = [name for name in (*missing, *report.mismatched) if name not in trained]
    if frozen and not full_rounds:
        yield (
            f"{_grouped(frozen)}: random weights that no client trains; name the module in"
            " adapter.head_modules to train it"
        )
    if unused:
        yield f"{source}: tensors unknown to the model are not used: {_grouped(unused)}"


def _prefixes(net: nn.Module, adapter: Adapter) -> tuple[str, ...]:
    """Return what the names of the head's tensors begin with."""
    return tuple(f"{name}." for name in head_modules(net, adapter))


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) != 1 else ' is'}"


def _grouped(names: Iterable[str]) -> str:
    """Return modules with the number of their tensors: `classifier (2), bert.pooler (2)`."""
    groups: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        groups[".".join((parts[:-1] or parts)[:2])] += 1
    return listed([f"{group} ({count})" for group, count in groups.items()])
