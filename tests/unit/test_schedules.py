"""Cooling curves against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from rayfed_lora.annealing import schedules
from rayfed_lora.plugins import tables

SHAPES = [*tables.SHAPES]


def values(shape: str, start: float, end: float, rounds: int, steps: int = 4) -> list[float]:
    value = schedules.cooling(shape, start, end, rounds, {"steps": steps})
    return [value(i) for i in range(rounds)]


def test_linear_cooling_falls_by_the_same_amount_each_round():
    # 16 - 14 u for u = 1/4, 2/4, 3/4, 1
    assert values("linear", 16, 2, 4) == [12.5, 9.0, 5.5, 2.0]


def test_cosine_cooling_is_half_way_at_half_time_and_slow_at_both_ends():
    # 2 + 14 (1 + cos(pi u)) / 2, with cos(pi/4) = sqrt(1/2)
    fast = 7 * math.sqrt(0.5)
    assert values("cosine", 16, 2, 4) == pytest.approx([9 + fast, 9, 9 - fast, 2], abs=1e-12)


def test_cubic_cooling_falls_steeply_at_first():
    # 2 + 14 (1 - u)^3: 2 + 14 * 27/64, 2 + 14 * 8/64, 2 + 14 * 1/64, 2
    assert values("cubic", 16, 2, 4) == [7.90625, 3.75, 2.21875, 2.0]


def test_exponential_cooling_multiplies_by_the_same_factor_each_round():
    # 16 -> 1 in four rounds: a factor of (1/16)^(1/4) = 1/2
    assert values("exponential", 16, 1, 4) == [8.0, 4.0, 2.0, 1.0]


def test_exponential_cooling_to_zero_is_zero_at_once():
    # R0 (0 / R0)^u = 0 for every u > 0
    assert values("exponential", 16, 0, 3) == [0.0, 0.0, 0.0]


def test_exponential_cooling_from_zero_stays_at_zero():
    assert values("exponential", 0, 0, 2) == [0.0, 0.0]


def test_logarithmic_cooling_follows_the_common_logarithm():
    # 10 - 10 log10(1 + 9u): at u = 1/9, 4/9, 1 the argument is 2, 5, 10
    got = values("logarithmic", 10, 0, 9)
    log2 = math.log10(2)
    assert [got[0], got[3], got[8]] == pytest.approx([10 - 10 * log2, 10 * log2, 0], abs=1e-12)


def test_constant_cooling_stays_at_the_start():
    assert values("constant", 16, 2, 3) == [16, 16, 16]


def test_step_cooling_has_plateaus_of_equal_length_and_equal_height():
    # 16 - 16 ceil(4u) / 4, two of eight rounds on each of the four plateaus
    assert values("step", 16, 0, 8, steps=4) == [12, 12, 8, 8, 4, 4, 0, 0]


def test_step_cooling_splits_rounds_that_do_not_divide_by_ceil():
    # 4u = 0.4 0.8 1.2 1.6 2.0 2.4 2.8 3.2 3.6 4.0, rounded up: 1 1 2 2 2 3 3 4 4 4
    assert values("step", 16, 0, 10, steps=4) == [12, 12, 8, 8, 8, 4, 4, 0, 0, 0]


def test_step_cooling_with_more_steps_than_rounds_skips_plateaus():
    # ceil(8 * 1/2) / 8 = 1/2 and 1
    assert values("step", 16, 0, 2, steps=8) == [8, 0]


def test_step_cooling_is_not_misled_by_a_product_just_above_a_whole_number():
    # u * steps = (7 / 25) * 25 is 7.000000000000001 in floats, and 7 in truth
    assert (7 / 25) * 25 > 7
    assert schedules.cooling("step", 25, 0, 25, {"steps": 25})(6) == 25 - 7


@pytest.mark.parametrize("shape", SHAPES)
def test_one_cooling_round_goes_straight_to_its_end(shape):
    assert values(shape, 16, 2, 1) == [16 if shape == "constant" else 2]


@pytest.mark.parametrize(
    ("shape", "start", "end"), [("exponential", 22, 15), ("logarithmic", 15, 0)]
)
def test_the_last_cooling_round_is_exactly_at_its_end(shape, start, end):
    # in floats 22 * (15 / 22) is 14.999999999999998, and -15 * log(10) / log(10) is not -15
    assert values(shape, start, end, 5)[-1] == end


@pytest.mark.parametrize("rounds", [0, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_cooling_refuses_a_stage_without_rounds(shape, rounds):
    with pytest.raises(ValueError, match=f"rounds > 0.*got {rounds}"):
        schedules.cooling(shape, 16, 2, rounds)


def test_an_unknown_shape_is_refused_with_every_known_one_named():
    with pytest.raises(ValueError, match="'sigmoid'") as caught:
        schedules.cooling("sigmoid", 16, 2, 4)
    assert all(shape in str(caught.value) for shape in SHAPES)


def test_the_shapes_are_those_of_the_method():
    method = {
        "linear",
        "cosine",
        "cubic",
        "exponential",
        "logarithmic",
        "step",
        "constant",
        "cyclic",
    }
    assert set(SHAPES) == method


def test_a_ramp_starts_at_its_start_and_ends_at_its_end():
    # 2 + 14 i / 4
    value = schedules.ramp(2, 16, 5)
    assert [value(i) for i in range(5)] == [2.0, 5.5, 9.0, 12.5, 16.0]


def test_a_ramp_of_one_round_is_at_its_end():
    assert schedules.ramp(2, 16, 1)(0) == 16


@pytest.mark.parametrize("rounds", [0, -3])
def test_a_ramp_refuses_a_stage_without_rounds(rounds):
    with pytest.raises(ValueError, match=f"rounds > 0, got {rounds}"):
        schedules.ramp(2, 16, rounds)


@pytest.mark.parametrize(
    ("value", "rank"),
    [(8.0, 8), (8.25, 8), (8.5, 9), (7.5, 8), (8.75, 9), (2.5, 3)],
)
def test_a_rank_is_rounded_half_up_not_half_to_even(value, rank):
    assert schedules.to_rank(value, 16, 2) == rank


@pytest.mark.parametrize(("start", "end"), [(16, 2), (2, 16)])
def test_a_rank_is_clipped_to_the_range_of_the_stage_whichever_way_it_runs(start, end):
    assert schedules.to_rank(1.2, start, end) == 2
    assert schedules.to_rank(16.7, start, end) == 16
    assert schedules.to_rank(9.2, start, end) == 9


def test_a_linear_rank_that_is_exactly_half_way_is_rounded_up():
    # 21 - 21 * 9/14 = 7.5
    value = schedules.cooling("linear", 21, 0, 14)(8)
    assert schedules.to_rank(value, 21, 0) == 8


def test_a_ramped_rank_that_is_exactly_half_way_is_rounded_up():
    # 11 * 15/22 = 7.5
    assert schedules.to_rank(schedules.ramp(0, 11, 23)(15), 0, 11) == 8


def test_cyclic_cooling_falls_as_often_as_asked_and_ends_at_the_end():
    # Two cycles of a half cosine in four rounds: 2 + 14 (1 + cos(pi v)) / 2 for v = 1/2, 1, 1/2, 1
    assert values("cyclic", 16, 2, 4) == pytest.approx([9, 2, 9, 2], abs=1e-12)
    value = schedules.cooling("cyclic", 16, 2, 6, {"cycles": 3})
    assert [value(i) for i in range(6)] == pytest.approx([9, 2, 9, 2, 9, 2], abs=1e-12)
