"""States are known by their version and judged by their ranks: a copy changes no result."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayfed_lora.federation.run import Run, kept_moments
from rayfed_lora.federation.transitions import enter, make_read_only
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel, RoundPlan
from tests.fakes import SHAPE, make_recipe


def state(rank: int = 2, scale: float = 3.0) -> AdapterState:
    def factors(d_out: int, d_in: int) -> Factors:
        a, b = np.full((rank, d_in), 1.0, np.float32), np.ones((d_out, rank), np.float32)
        return Factors(a, b, scale)

    return AdapterState(
        {"q": factors(6, 4), "v": factors(4, 3)}, {"head": np.ones((2, 3), np.float32)}
    )


NAMES = {"head", "A of q", "B of q", "A of v", "B of v"}


def kept(before: AdapterState, rank: int = 2) -> set[str]:
    """Return the moments that are left in a round of a rank after one that left a state."""
    run = Run(3, GlobalModel(before, Base(), "adapter"), moments=dict.fromkeys(NAMES, ()))
    # Scale alpha / heating rank = 6 / 2.
    recipe = make_recipe(adapter__scaling="constant", annealing__heating__rank=2)
    plan = RoundPlan(3, "heating", "adapter", rank, 0.0)
    return {*kept_moments(run, enter(recipe, SHAPE, run.model, plan))}


def test_moments_survive_a_round_of_the_same_rank_and_scale_and_no_other() -> None:
    assert kept(state()) == NAMES
    assert kept(replace(state())) == NAMES
    assert kept(state(), rank=1) == {"head"}
    assert kept(state(), rank=3) == {"head"}
    assert kept(state(scale=1.0)) == {"head"}
    assert kept(replace(state(), factors={})) == {"head"}


def test_a_version_is_that_of_one_value_wherever_it_goes() -> None:
    one = state()
    assert pickle.loads(pickle.dumps(one)).version == one.version
    versions = {one.version, state().version, replace(one).version, replace(one, dense={}).version}
    assert len(versions) == 4
    # Nothing else depends on it.
    assert AdapterState({}, {}) == AdapterState({}, {})


def test_a_global_state_cannot_be_changed_in_place() -> None:
    found = state()
    make_read_only(found)
    for array in (found.factors["q"].a, found.factors["q"].b, found.dense["head"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 2
