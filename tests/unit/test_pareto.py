"""Fronts, best rows and knees, by hand and against the definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rayfed_lora.tuning.pareto import best, knee, on_front

ACCURACY_AND_BYTES = ("max", "min")


def test_the_front_is_what_no_other_row_beats_in_everything():
    values = np.array([[0.9, 100.0], [0.8, 50.0], [0.8, 60.0], [0.7, 55.0], [0.9, 100.0]])
    # The third sends more than the second for the same, the fourth is worse in both.
    expected = [True, True, False, False, True]
    assert on_front(values, ACCURACY_AND_BYTES).tolist() == expected


@given(arrays(np.float64, (6, 3), elements=st.integers(0, 3).map(float)))
def test_the_front_is_the_definition(values):
    modes = ("max", "min", "max")
    signed = values * [1, -1, 1]
    expected = [not any(all(b >= a) and any(b > a) for b in signed) for a in signed]
    assert on_front(values, modes).tolist() == expected


def test_the_best_in_one_objective_is_chosen_by_the_others_where_it_is_not_alone():
    values = np.array([[0.9, 100.0], [0.8, 50.0], [0.9, 90.0]])
    assert best(values, ACCURACY_AND_BYTES, 0) == 2
    assert best(values, ACCURACY_AND_BYTES, 1) == 1


def test_the_knee_is_nearest_to_the_ideal_point():
    # Scaled losses of the front: (0, 1), (0.1, 0.2), (1, 0); squared distances 1, 0.05, 1.
    values = np.array([[1.0, 110.0], [0.9, 30.0], [0.0, 10.0], [0.5, 200.0]])
    assert knee(values, ACCURACY_AND_BYTES) == 1


def test_a_front_of_one_row_is_its_own_knee():
    assert knee(np.array([[0.5, 3.0], [0.4, 4.0]]), ACCURACY_AND_BYTES) == 0
