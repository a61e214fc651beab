"""How the global model enters a round, against dense algebra."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from rayfed_lora.federation.transitions import allocate, enter, planned, resized_adapter
from rayfed_lora.types import AdapterState, Base, Factors, FloatArray, GlobalModel, RoundPlan
from tests.fakes import SHAPE, WEIGHTS, effective, initial, make_recipe

MODULES = {"q": (6, 4), "v": (4, 3)}  # d_out, d_in


def plan(t: int, rank: int, trainable: str = "adapter") -> RoundPlan:
    return RoundPlan(t, "cooling", trainable, rank, 0.0)


def trained(
    ranks: Mapping[str, int], scale: float = 2.0, sizes: Mapping[str, float] | None = None
) -> AdapterState:
    """Return random factors; `sizes` multiplies a module's update."""
    draw = np.random.default_rng(7)

    def array(*shape: int) -> FloatArray:
        return draw.normal(size=shape).astype(np.float32)

    factors = {}
    for name, (d_out, d_in) in MODULES.items():
        size = np.float32((sizes or {}).get(name, 1.0))
        factors[name] = Factors(array(ranks[name], d_in), array(d_out, ranks[name]) * size, scale)
    return AdapterState(factors, {"head": array(2, 3)})


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))


def nearest(update: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation of a rank, by numpy's dense SVD."""
    u, s, vt = np.linalg.svd(update)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def full_model(root: int = 0) -> GlobalModel:
    tensors = {name: initial(name) + np.float32(1) for name in WEIGHTS}
    return GlobalModel(AdapterState({}, tensors), Base(root), "full")


def test_a_full_round_starts_from_the_very_model():
    model = full_model()
    entry = enter(make_recipe(), SHAPE, model, plan(0, 0, "full"))
    assert entry.model is model
    assert entry.resizing.ranks == {}
    assert (entry.resizing.cut, entry.resizing.folded_params) == (None, 0)


def test_after_a_full_stage_the_aggregate_is_the_base_and_the_head_stays_trained():
    model = full_model()
    entry = enter(make_recipe(), SHAPE, model, plan(1, 2))
    base = entry.model.base
    assert (entry.model.trainable, base.root, base.merges) == ("adapter", 1, 0)
    assert base.tensors is not None
    assert list(base.tensors) == ["embed", "q.weight", "v.weight"]
    assert list(entry.model.state.dense) == ["head"]
    np.testing.assert_array_equal(base.tensors["q.weight"], initial("q.weight") + 1)
    np.testing.assert_array_equal(entry.model.state.dense["head"], initial("head") + 1)
    # The model that comes in is as it was.
    assert list(model.state.dense) == list(WEIGHTS)


def test_a_fresh_adapter_has_no_effect_and_rows_within_one_over_root_d_in():
    entry = enter(make_recipe(), SHAPE, full_model(), plan(1, 3))
    assert entry.resizing.ranks == {"q": 3, "v": 3}
    for name, (d_out, d_in) in MODULES.items():
        f = entry.model.state.factors[name]
        assert (f.a.shape, f.b.shape) == ((3, d_in), (d_out, 3))
        assert (f.a.dtype, f.b.dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(f.b, 0)
        assert 0 < np.abs(f.a).max() <= 1 / np.sqrt(d_in)
        assert f.scale == 6.0 / 3  # alpha / heating.rank


def test_a_fresh_adapters_rank_is_at_most_what_the_module_can_have():
    entry = enter(make_recipe(annealing__heating__rank=9), SHAPE, full_model(), plan(1, 9))
    assert entry.resizing.ranks == {"q": 4, "v": 3}


def test_a_fresh_adapter_depends_on_the_seed_and_the_module_alone():
    def rows(seed: int) -> dict[str, FloatArray]:
        entry = enter(make_recipe(seed=seed), SHAPE, full_model(), plan(1, 3))
        return {name: f.a for name, f in entry.model.state.factors.items()}

    first, again, other = rows(1), rows(1), rows(2)
    np.testing.assert_array_equal(first["q"], again["q"])
    assert not np.array_equal(first["q"], other["q"])
    assert not np.array_equal(first["q"][:, :3], first["v"])


def test_an_adapter_that_starts_without_a_full_stage_keeps_the_sources_base():
    head = {"head": initial("head")}
    model = GlobalModel(AdapterState({}, head), Base(), "adapter")
    entry = enter(make_recipe(), SHAPE, model, plan(0, 2))
    assert entry.model.base == Base()
    assert {name: f.rank for name, f in entry.model.state.factors.items()} == {"q": 2, "v": 2}


def test_a_round_at_the_same_rank_starts_from_the_very_factors():
    state = trained({"q": 2, "v": 2})
    model = GlobalModel(state, Base(), "adapter")
    entry = enter(make_recipe(), SHAPE, model, plan(3, 2))
    assert entry.model.state.factors["q"] is state.factors["q"]
    assert entry.unchanged and entry.model.state.version == state.version


@pytest.mark.parametrize("scaling", ["constant", "alpha_over_rank", "rslora"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_shrink_keeps_the_best_approximation_in_every_scaling(scaling, rank):
    recipe = make_recipe(adapter__scaling=scaling)
    state = trained({"q": 3, "v": 3})
    entry = enter(recipe, SHAPE, GlobalModel(state, Base(), "adapter"), plan(4, rank))
    for name in MODULES:
        new = entry.model.state.factors[name]
        assert new.rank == rank
        expected = nearest(dense(state.factors[name]), rank)
        np.testing.assert_allclose(dense(new), expected, atol=1e-5)
    assert entry.model.base == Base()
    np.testing.assert_array_equal(entry.model.state.dense["head"], state.dense["head"])


@pytest.mark.parametrize(
    ("scaling", "scale"), [("constant", 2.0), ("alpha_over_rank", 6.0), ("rslora", 6.0)]
)
def test_a_shrink_to_rank_1_has_the_scale_of_its_mode(scaling, scale):
    # alpha 6, heating rank 3: 6 / 3, 6 / 1 and 6 / sqrt(1).
    state = trained({"q": 3, "v": 3})
    recipe = make_recipe(adapter__scaling=scaling)
    new = resized_adapter(recipe, state, {"q": 1, "v": 1}, 4)
    assert new.factors["q"].scale == scale


@pytest.mark.parametrize("scaling", ["constant", "alpha_over_rank", "rslora"])
def test_a_rank_that_rises_leaves_the_update_as_it_is_in_every_scaling(scaling):
    recipe = make_recipe(adapter__scaling=scaling)
    state = trained({"q": 1, "v": 1})
    entry = enter(recipe, SHAPE, GlobalModel(state, Base(), "adapter"), plan(4, 3))
    for name in MODULES:
        new = entry.model.state.factors[name]
        assert new.rank == 3
        np.testing.assert_allclose(dense(new), dense(state.factors[name]), rtol=1e-6, atol=1e-6)
        assert np.abs(new.a[1:]).min() > 0
        np.testing.assert_array_equal(new.b[:, 1:], 0)


def test_new_rows_of_the_same_module_differ_from_round_to_round():
    state = trained({"q": 1, "v": 1})
    rows = [
        resized_adapter(make_recipe(), state, {"q": 2, "v": 2}, t).factors["q"].a[1] for t in (4, 5)
    ]
    assert not np.array_equal(*rows)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_folded_shrink_leaves_the_whole_model_as_it_is(rank):
    recipe = make_recipe(annealing__cooling__residual="fold")
    model = GlobalModel(trained({"q": 3, "v": 3}), Base(), "adapter")
    before = effective(model.state, model.base, "adapter")
    entry = enter(recipe, SHAPE, model, plan(4, rank))
    after = effective(entry.model.state, entry.model.base, "adapter")
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, atol=2e-5)
    assert entry.resizing.cut == {"q": 3, "v": 3}
    # The rest has 3 - rank directions: 10 values each in q, 7 in v.
    assert entry.resizing.folded_params == (3 - rank) * 17
    assert model.base == Base()
    assert not entry.unchanged and entry.model.state.version != model.state.version
    # The plan, which knows no model, says the same.
    assert planned(recipe, SHAPE, 3, plan(4, rank)) == entry.resizing


def test_folds_add_up_over_several_shrinks():
    recipe = make_recipe(annealing__cooling__residual="fold")
    model = GlobalModel(trained({"q": 3, "v": 3}), Base(), "adapter")
    before = effective(model.state, model.base, "adapter")
    for t, rank in ((3, 2), (4, 1)):
        model = enter(recipe, SHAPE, model, plan(t, rank)).model
    assert model.base.merges == 2
    after = effective(model.state, model.base, "adapter")
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, atol=4e-5)


def test_nothing_is_folded_where_no_rank_falls():
    recipe = make_recipe(annealing__cooling__residual="fold")
    model = GlobalModel(trained({"q": 2, "v": 2}), Base(), "adapter")
    entry = enter(recipe, SHAPE, model, plan(4, 3))
    assert entry.model.base == Base()
    assert (entry.resizing.cut, entry.resizing.folded_params) == (None, 0)


def test_only_modules_that_shrink_are_folded():
    # v's update is 100 times q's: the budget of rank 1 (17 values) buys two directions of v.
    recipe = make_recipe(annealing__cooling__residual="fold", annealing__allocation="spectral")
    state = trained({"q": 3, "v": 2}, sizes={"v": 100.0})
    entry = enter(recipe, SHAPE, GlobalModel(state, Base(), "adapter"), plan(4, 1))
    assert entry.resizing.ranks == {"q": 0, "v": 2}
    assert list(entry.model.base.merged) == ["q"]
    assert entry.resizing.cut == {"q": 3, "v": 2}
    assert entry.resizing.folded_params == 3 * 10


def test_spectral_allocation_starts_after_the_first_heating_round():
    # Round 0 is initiating, 1 and 2 are heating. Rank 1 is worth 17 values: two directions of v.
    recipe = make_recipe(annealing__allocation="spectral")
    state = trained({"q": 3, "v": 3}, sizes={"v": 100.0})
    assert allocate(recipe, SHAPE, state, 1, 1) == {"q": 1, "v": 1}
    assert allocate(recipe, SHAPE, state, 2, 1) == {"q": 0, "v": 2}
    assert allocate(recipe, SHAPE, state, 3, 1) == {"q": 0, "v": 2}


def test_an_adapter_initiating_stage_is_uniform_under_spectral_allocation():
    recipe = make_recipe(
        annealing__allocation="spectral",
        annealing__initiating__trainable="adapter",
        annealing__initiating__rounds=2,
    )
    state = trained({"q": 3, "v": 3}, sizes={"v": 100.0})
    assert allocate(recipe, SHAPE, state, 1, 1) == {"q": 1, "v": 1}
    assert allocate(recipe, SHAPE, state, 2, 1) == {"q": 1, "v": 1}
    assert allocate(recipe, SHAPE, state, 3, 1) == {"q": 0, "v": 2}


def test_uniform_allocation_pays_no_heed_to_energy():
    state = trained({"q": 3, "v": 3}, sizes={"v": 100.0})
    assert allocate(make_recipe(), SHAPE, state, 4, 2) == {"q": 2, "v": 2}
