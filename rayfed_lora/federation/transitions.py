"""How the global state enters a round: a new adapter, another rank, another base.

Source: docs/method.md, "Stages" and "Resizing the rank".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from rayfed_lora.aggregation.means import Product
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.step import product
from rayfed_lora.annealing import budget
from rayfed_lora.annealing.stages import locate, scheduled_rank
from rayfed_lora.lora import resize
from rayfed_lora.lora.products import spectrum
from rayfed_lora.plugins.calls import own_method
from rayfed_lora.plugins.tables import ALLOCATIONS
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import (
    AdapterState,
    Base,
    Factors,
    FloatArray,
    GlobalModel,
    ModelShape,
    RoundPlan,
)


@dataclass(frozen=True)
class Resizing:
    """A change of ranks, as far as the messages of a round depend on it.

    Attributes:
        ranks: rank by module; empty in a full-model round.
        cut: rank by module before a shrink whose rest was folded into the base: clients are sent
            the factors before the cut and fold the rest themselves.
        folded_params: number of values that were folded.
        shrunk: whether the server has cut some module's factors since the last round's result. A
            rise needs no message: clients draw the new rows of A from the seed.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, int] | None = None
    folded_params: int = 0
    shrunk: bool = False


@dataclass(frozen=True)
class Start:
    """The global model that a round starts from, resized and on its base.

    `unchanged`: its factors are those that the round before has left.
    """

    model: GlobalModel
    resizing: Resizing
    unchanged: bool = False


def enter(recipe: Recipe, shape: ModelShape, model: GlobalModel, plan: RoundPlan) -> Start:
    """Return the model as round `plan` starts from it. The given model is not changed."""
    if plan.trainable == "full":
        return Start(model, Resizing(), unchanged=True)
    if model.trainable == "full":
        model = _on_new_base(shape, model)
    old, base = model.state, model.base
    if not old.factors:
        ranks = allocate(recipe, shape, old, plan.round, plan.rank)
        state = replace(old, factors=_new_factors(recipe, shape, ranks, plan.round))
        return Start(replace(model, state=state), Resizing(ranks))
    ranks = allocate(recipe, shape, old, plan.round, plan.rank)
    state = resized_adapter(recipe, old, ranks, plan.round)
    resizing = _resizing(recipe, shape, {name: f.rank for name, f in old.factors.items()}, ranks)
    if resizing.cut is not None:
        shrunk = {name: f for name, f in old.factors.items() if ranks[name] < f.rank}
        rest = {name: product(resize.cut_off(f, ranks[name])) for name, f in shrunk.items()}
        base = with_updates(base, rest)
    same = state.version == old.version
    return Start(GlobalModel(state, base, "adapter"), resizing, unchanged=same)


def started(
    recipe: Recipe, shape: ModelShape, dense: Mapping[str, FloatArray], start: AdapterState
) -> GlobalModel:
    """Return the model before the first round of a run that starts from an adapter.

    Its factors have the ranks of that round. Where rounds leave no factors they go into the base.

    Args:
        recipe: the run, without full-model rounds.
        shape: of the model.
        dense: the head as the source has it.
        start: the adapter; its own head comes first.
    """
    state = AdapterState(start.factors, {**dense, **start.dense})
    rank = scheduled_rank(recipe.annealing, 0)
    state = resized_adapter(recipe, state, allocate(recipe, shape, state, 0, rank), 0)
    if RULES[recipe.aggregation.rule].restarts:
        updates = {name: product(f) for name, f in state.factors.items()}
        return GlobalModel(replace(state, factors={}), with_updates(Base(), updates), "adapter")
    return GlobalModel(state, Base(), "adapter")


def planned(
    recipe: Recipe, shape: ModelShape, rank_before: int | None, plan: RoundPlan
) -> Resizing:
    """Return the resizing of a round whose model is not known.

    An allocation that looks at the model counts as uniform.

    `rank_before` is the uniform rank of the factors before the round; None: there are none.
    """
    if plan.trainable == "full":
        return Resizing()
    nothing = AdapterState({}, {})
    ranks = allocate(recipe, shape, nothing, plan.round, plan.rank)
    if rank_before is None:
        return Resizing(ranks)
    before = allocate(recipe, shape, nothing, plan.round - 1, rank_before)
    return _resizing(recipe, shape, before, ranks)


def _resizing(
    recipe: Recipe, shape: ModelShape, before: Mapping[str, int], ranks: Mapping[str, int]
) -> Resizing:
    lost = {name: rank - ranks[name] for name, rank in before.items() if rank > ranks[name]}
    if not lost or recipe.annealing.cooling.residual == "drop":
        return Resizing(ranks, shrunk=bool(lost))
    folded = budget.cost({name: shape.modules[name] for name in lost}, lost)
    return Resizing(ranks, before, folded, shrunk=True)


def _on_new_base(shape: ModelShape, model: GlobalModel) -> GlobalModel:
    """Freeze the aggregated full model; its head stays trained."""
    dense = model.state.dense
    frozen = {name: tensor for name, tensor in dense.items() if name not in shape.head}
    head = {name: dense[name] for name in shape.head}
    return GlobalModel(AdapterState({}, head), Base(model.base.root + 1, frozen), "adapter")


def _new_factors(
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

    One that looks at spectra needs a trained adapter: initiating rounds, the first heating round
    and a state without factors are uniform.

    Raises:
        RunError: an own allocation raised, or its result is no allocation.
    """
    stage, i = locate(recipe.annealing, round_index)
    untrained = stage == "initiating" or (stage == "heating" and i == 0) or not state.factors
    settings = recipe.annealing.allocates
    rule = ALLOCATIONS.with_options(settings.name, settings.options)
    if rule.needs_spectra and untrained:
        rule = ALLOCATIONS["uniform"]
    spectra: tuple[budget.Spectra, ...] = ()
    if rule.needs_spectra:
        spectra = ({name: spectrum(f).tolist() for name, f in state.factors.items()},)
    with own_method("allocation", settings.name, round_index):
        found = rule.compute(shape.modules, *spectra, rank)
        ranks: dict[str, int] = budget.checked(found, shape.modules, rank)
    return ranks


def resized_adapter(
    recipe: Recipe, state: AdapterState, ranks: Mapping[str, int], round_index: int
) -> AdapterState:
    """Return the state with each module at its new rank and scale; the same one if none changes."""
    scales = {name: _scale(recipe, ranks[name]) for name in state.factors}
    if all(f.rank == ranks[n] and f.scale == scales[n] for n, f in state.factors.items()):
        return state
    factors = {}
    for index, (name, f) in enumerate(state.factors.items()):
        rng = generator(recipe.seed, Purpose.FACTOR_INIT, round_index, index)
        factors[name] = resize.resize(f, ranks[name], scales[name], rng)
    return replace(state, factors=factors)


def make_read_only(state: AdapterState) -> None:
    """Make the arrays of a global state read-only.

    Engines send a state once. Code that changes a state in place would otherwise train the next
    round from the old values on Ray and from the new ones locally.
    """
    arrays = [array for f in state.factors.values() for array in (f.a, f.b)]
    for array in (*arrays, *state.dense.values()):
        array.flags.writeable = False


def with_updates(base: Base, updates: Mapping[str, Product]) -> Base:
    """Return the base with (b, a) by module added to its weights; itself without any."""
    if not updates:
        return base
    sums = dict(base.merged)
    for name, (b, a) in updates.items():
        sums[name] = (sums.get(name, np.float32(0)) + b @ a).astype(np.float32)
    return replace(base, merges=base.merges + 1, merged=sums)
