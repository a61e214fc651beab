"""How the global state enters a round: a new adapter, another rank, another base.

Source: this project (docs/method.md, "Stages" and "Resizing the rank").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rayfed_lora.aggregation.step import Product, product
from rayfed_lora.annealing import budget
from rayfed_lora.annealing.stages import locate
from rayfed_lora.lora import resize
from rayfed_lora.lora.products import spectrum
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import AdapterState, Base, Factors, ModelShape, RoundPlan, Trainable


@dataclass(frozen=True)
class GlobalModel:
    """The global model between rounds.

    Attributes:
        state: what is trained and sent.
        base: what is frozen; not looked at while `trainable` is `full`.
        trainable: the kind of round that the state belongs to.
    """

    state: AdapterState
    base: Base
    trainable: Trainable


@dataclass(frozen=True)
class Entry:
    """The global model as a round starts from it.

    Attributes:
        model: resized, on its base.
        ranks: rank by module; empty in a full-model round.
        cut: rank by module before a shrink whose rest was folded into the base, else None.
        folded_params: number of values in what was folded.
    """

    model: GlobalModel
    ranks: Mapping[str, int]
    cut: Mapping[str, int] | None = None
    folded_params: int = 0


def enter(recipe: Recipe, shape: ModelShape, model: GlobalModel, plan: RoundPlan) -> Entry:
    """Return the model as round `plan` starts from it. The given model is not changed."""
    if plan.trainable == "full":
        return Entry(model, {})
    if model.trainable == "full":
        model = _on_new_base(shape, model)
    if not model.state.factors:
        ranks = budget.uniform(shape.modules, plan.rank)
        factors = _fresh(recipe, shape, ranks, plan.round)
        state = replace(model.state, factors=factors)
        return Entry(replace(model, state=state), ranks)
    return _resized(recipe, shape, model, plan)


def _on_new_base(shape: ModelShape, model: GlobalModel) -> GlobalModel:
    """Freeze the aggregated full model; its head stays trained."""
    dense = model.state.dense
    frozen = {name: tensor for name, tensor in dense.items() if name not in shape.head}
    head = {name: dense[name] for name in shape.head}
    return GlobalModel(AdapterState({}, head), Base(model.base.root + 1, frozen), "adapter")


def _fresh(
    recipe: Recipe, shape: ModelShape, ranks: Mapping[str, int], round_index: int
) -> dict[str, Factors]:
    """Return new factors with B = 0."""
    factors = {}
    for index, (name, module) in enumerate(shape.modules.items()):
        rng = generator(recipe.seed, Purpose.FACTOR_INIT, round_index, index)
        rows = resize.initial_rows(ranks[name], module.d_in, rng)
        columns = np.zeros((module.d_out, ranks[name]), np.float32)
        factors[name] = Factors(rows, columns, _scale(recipe, ranks[name]))
    return factors


def _scale(recipe: Recipe, rank: int) -> float:
    heating_rank = recipe.annealing.heating.rank
    return resize.module_scale(recipe.adapter.scaling, recipe.adapter.alpha, heating_rank, rank)


def allocate(
    recipe: Recipe, shape: ModelShape, state: AdapterState, round_index: int, rank: int
) -> dict[str, int]:
    """Return the rank of each module for a round's uniform rank.

    Spectral allocation needs a trained adapter: initiating rounds and the first heating round
    are uniform.
    """
    stage, i = locate(recipe.annealing, round_index)
    untrained = stage == "initiating" or (stage == "heating" and i == 0)
    if recipe.annealing.allocation == "uniform" or untrained:
        return budget.uniform(shape.modules, rank)
    spectra = {name: spectrum(f).tolist() for name, f in state.factors.items()}
    return budget.spectral(shape.modules, spectra, rank)


def resized(
    recipe: Recipe, state: AdapterState, ranks: Mapping[str, int], round_index: int
) -> AdapterState:
    """Return the state with each module at its new rank and scale; the same one if none changes."""
    factors = {}
    for index, (name, f) in enumerate(state.factors.items()):
        rng = generator(recipe.seed, Purpose.FACTOR_INIT, round_index, index)
        factors[name] = resize.resize(f, ranks[name], _scale(recipe, ranks[name]), rng)
    unchanged = all(factors[name] is f for name, f in state.factors.items())
    return state if unchanged else replace(state, factors=factors)


def _resized(recipe: Recipe, shape: ModelShape, model: GlobalModel, plan: RoundPlan) -> Entry:
    old = model.state
    ranks = allocate(recipe, shape, old, plan.round, plan.rank)
    state = resized(recipe, old, ranks, plan.round)
    shrunk = {name: f for name, f in old.factors.items() if ranks[name] < f.rank}
    if recipe.annealing.cooling.residual == "drop" or not shrunk:
        return Entry(replace(model, state=state), ranks)
    fold = {name: resize.cut_off(f, ranks[name]) for name, f in shrunk.items()}
    base = merged(model.base, {name: product(f) for name, f in fold.items()})
    cut = {name: f.rank for name, f in old.factors.items()}
    params = sum(f.a.size + f.b.size for f in fold.values())
    return Entry(GlobalModel(state, base, "adapter"), ranks, cut, params)


def protected(state: AdapterState) -> AdapterState:
    """Make the arrays of a global state read-only, and return the same state.

    Executors keep by identity what they have sent. Code that changes a state in place would
    otherwise train the next round from the old values on Ray and from the new ones locally.
    """
    arrays = [array for f in state.factors.values() for array in (f.a, f.b)]
    for array in (*arrays, *state.dense.values()):
        array.flags.writeable = False
    return state


def merged(base: Base, updates: Mapping[str, Product]) -> Base:
    """Return the base with some updates added to its modules' weights; itself without any.

    Args:
        base: the frozen base.
        updates: (b, a) by module.
    """
    if not updates:
        return base
    sums = dict(base.merged)
    for name, (b, a) in updates.items():
        sums[name] = (sums.get(name, np.float32(0)) + b @ a).astype(np.float32)
    return replace(base, merges=base.merges + 1, merged=sums)
