"""Cooling curves for any ranks and lengths, against docs/method.md's formulas written anew."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayfed_lora.annealing import schedules

RANK = st.integers(0, 128)
ROUNDS = st.integers(1, 200)
STEPS = st.integers(1, 32)
SHAPES = ["linear", "cosine", "cubic", "exponential", "logarithmic", "step"]
cheap = settings(max_examples=60, deadline=None)


def curve_from_the_method(shape: str, r0: int, r1: int, n: int, steps: int) -> np.ndarray:
    """All n values of a shape, vectorised, as docs/method.md words them."""
    u = np.arange(1, n + 1) / n
    if shape == "linear":
        return r0 + (r1 - r0) * u
    if shape == "cosine":
        return r1 + (r0 - r1) * (1 + np.cos(np.pi * u)) / 2
    if shape == "cubic":
        return r1 + (r0 - r1) * (1 - u) ** 3
    if shape == "exponential":
        return r0 * np.power(r1 / r0, u) if r0 else np.zeros(n)
    if shape == "logarithmic":
        return r0 + (r1 - r0) * np.log10(1 + 9 * u)
    plateau = [math.ceil(Fraction(i + 1, n) * steps) for i in range(n)]
    return r0 + (r1 - r0) * np.array(plateau) / steps


def code_values(shape: str, r0: int, r1: int, n: int, steps: int) -> np.ndarray:
    value = schedules.cooling(shape, r0, r1, n, {"steps": steps})
    return np.array([value(i) for i in range(n)])


@pytest.mark.parametrize("shape", SHAPES)
@cheap
@given(r0=RANK, r1=RANK, n=ROUNDS, steps=STEPS)
def test_every_shape_is_the_formula_of_the_method(shape, r0, r1, n, steps):
    high, low = max(r0, r1), min(r0, r1)
    got = code_values(shape, high, low, n, steps)
    expected = curve_from_the_method(shape, high, low, n, steps)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@cheap
@given(r0=RANK, r1=RANK, n=ROUNDS, steps=STEPS)
def test_cooling_never_rises_stays_in_range_and_ends_at_the_final_rank(shape, r0, r1, n, steps):
    high, low = max(r0, r1), min(r0, r1)
    got = code_values(shape, high, low, n, steps)
    assert np.all(np.diff(got) <= 0)
    assert np.all((got >= low - 1e-9) & (got <= high + 1e-9))
    assert got[-1] == pytest.approx(low, abs=1e-12)
    ranks = [schedules.to_rank(v, high, low) for v in got]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == low
    assert set(ranks) <= set(range(low, high + 1))


@pytest.mark.parametrize("shape", ["linear", "cosine", "cubic", "step"])
@cheap
@given(r0=RANK, r1=RANK, n=ROUNDS, steps=STEPS)
def test_the_last_value_is_the_end_without_any_rounding(shape, r0, r1, n, steps):
    assert code_values(shape, r0, r1, n, steps)[-1] == r1


@pytest.mark.parametrize("shape", SHAPES)
@cheap
@given(r0=st.integers(1, 128), r1=RANK, n=ROUNDS, steps=STEPS)
def test_the_first_cooling_round_has_already_moved(shape, r0, r1, n, steps):
    assume(r1 < r0)
    assert schedules.cooling(shape, r0, r1, n, {"steps": steps})(0) < r0


@cheap
@given(r0=RANK, r1=RANK, n=ROUNDS)
def test_constant_cooling_never_moves(r0, r1, n):
    assert set(code_values("constant", r0, r1, n, 4)) == {r0}


@cheap
@given(r0=RANK, r1=RANK, length=st.integers(1, 12), steps=STEPS)
def test_step_plateaus_are_equally_long_and_equally_high(r0, r1, length, steps):
    assume(r0 > r1)
    got = code_values("step", r0, r1, length * steps, steps)
    plateaus = got.reshape(steps, length)
    np.testing.assert_array_equal(plateaus, np.repeat(plateaus[:, :1], length, axis=1))
    falls = -np.diff([r0, *plateaus[:, 0]])
    np.testing.assert_allclose(falls, (r0 - r1) / steps, rtol=1e-9)


@cheap
@given(r0=RANK, r1=RANK, n=ROUNDS, data=st.data())
def test_a_rank_is_the_floor_of_the_exact_value_and_a_half(r0, r1, n, data):
    high, low = max(r0, r1), min(r0, r1)
    i = data.draw(st.integers(0, n - 1))
    u = Fraction(i + 1, n)
    exact = {
        "linear": high + (low - high) * u,
        "cubic": low + (high - low) * (1 - u) ** 3,
    }
    for shape, value in exact.items():
        assume(value % 1 != Fraction(1, 2))  # exact halves: tests/unit/test_schedules.py
        rank = schedules.to_rank(schedules.cooling(shape, high, low, n)(i), high, low)
        assert rank == math.floor(value + Fraction(1, 2)), shape


@cheap
@given(low=RANK, high=RANK, n=st.integers(2, 200))
def test_a_ramp_is_a_straight_line_between_its_ends(low, high, n):
    value = schedules.ramp(low, high, n)
    got = [value(i) for i in range(n)]
    np.testing.assert_allclose(got, np.linspace(low, high, n), rtol=1e-12, atol=1e-12)
    assert (got[0], got[-1]) == (low, high)


@cheap
@given(value=st.floats(-10, 300), start=RANK, end=RANK)
def test_a_rounded_rank_is_in_range_and_nearest_to_the_value(value, start, end):
    low, high = min(start, end), max(start, end)
    rank = schedules.to_rank(value, start, end)
    assert low <= rank <= high
    if low <= value <= high:
        assert abs(rank - value) <= 0.5
