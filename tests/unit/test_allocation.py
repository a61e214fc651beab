"""How a budget is spread over modules: small cases by hand."""

from __future__ import annotations

import pytest

from rayfed_lora.annealing import budget
from rayfed_lora.types import ModuleShape

SQUARES = {"q": ModuleShape(8, 8), "v": ModuleShape(8, 8)}  # 16 values a direction each


def test_uniform_gives_every_module_the_same_rank():
    shapes = {"q": ModuleShape(8, 8), "v": ModuleShape(8, 4)}
    assert budget.uniform(shapes, 3) == {"q": 3, "v": 3}


def test_uniform_gives_no_module_more_than_it_can_have():
    shapes = {"q": ModuleShape(8, 8), "v": ModuleShape(8, 2)}
    assert budget.uniform(shapes, 5) == {"q": 5, "v": 2}


def test_the_cost_is_the_number_of_values_in_both_factors():
    shapes = {"q": ModuleShape(3, 5), "v": ModuleShape(2, 2)}
    # q: A 4 x 3 and B 5 x 4 = 32; v: A 1 x 2 and B 2 x 1 = 4
    assert budget.cost(shapes, {"q": 4, "v": 1}) == 36


def test_the_strongest_directions_win_whatever_module_they_are_in():
    # a budget of 2 + 2 directions; the four largest of 5 4 3 | 2 1 0.5 are 5 4 3 2
    got = budget.spectral(SQUARES, {"q": [5, 4, 3], "v": [2, 1, 0.5]}, rank=2)
    assert got == {"q": 3, "v": 1}


def test_a_module_may_end_at_rank_zero():
    got = budget.spectral(SQUARES, {"q": [5, 4], "v": [1, 0.5]}, rank=1)
    assert got == {"q": 2, "v": 0}


def test_energy_is_counted_per_value_so_that_a_cheap_direction_wins():
    shapes = {"wide": ModuleShape(10, 10), "narrow": ModuleShape(2, 2)}
    # The budget of rank 1 is 20 + 4 = 24. Energy a value: wide 16/20 = 0.8, narrow 4/4 = 1 and
    # 3.24/4 = 0.81: narrow takes both (8 values), and the 16 that are left are too few for wide.
    spectra = {"wide": [4.0, 0.1], "narrow": [2.0, 1.8]}
    assert budget.spectral(shapes, spectra, rank=1) == {"wide": 0, "narrow": 2}


def test_what_is_too_dear_leaves_its_budget_to_what_still_fits():
    shapes = {"wide": ModuleShape(10, 10), "narrow": ModuleShape(2, 2)}
    # Budget 24: wide's first (25/20) leaves 4, its second (16/20) does not fit any more,
    # narrow's first (0.01/4) does.
    spectra = {"wide": [5.0, 4.0], "narrow": [0.1, 0.0]}
    assert budget.spectral(shapes, spectra, rank=1) == {"wide": 1, "narrow": 1}


def test_equal_spectra_of_equal_modules_give_the_uniform_rank():
    spectra = {"q": [3.0, 2.0, 1.0, 0.5], "v": [3.0, 2.0, 1.0, 0.5]}
    for rank in range(5):
        assert budget.spectral(SQUARES, spectra, rank) == {"q": rank, "v": rank}


def test_reheating_beyond_the_spectrum_spreads_what_is_left_evenly():
    # 8 directions; the 4 with energy go first, the other 4 are dealt one to each in turn
    got = budget.spectral(SQUARES, {"q": [3.0, 2.0], "v": [1.0, 0.5]}, rank=4)
    assert got == {"q": 4, "v": 4}


def test_reheating_an_adapter_of_uneven_ranks_evens_them_out():
    # 6 directions; 3 + 0 have energy, then 3 without: v's first, second and third come first
    got = budget.spectral(SQUARES, {"q": [3.0, 2.0, 1.0], "v": []}, rank=3)
    assert got == {"q": 3, "v": 3}


def test_an_untrained_adapter_is_spread_evenly():
    got = budget.spectral(SQUARES, {"q": [0.0, 0.0], "v": [0.0, 0.0]}, rank=2)
    assert got == {"q": 2, "v": 2}


def test_a_budget_of_nothing_gives_rank_zero_to_all():
    assert budget.spectral(SQUARES, {"q": [3.0], "v": [2.0]}, rank=0) == {"q": 0, "v": 0}


@pytest.mark.parametrize("allocate", [budget.uniform, lambda s, r: budget.spectral(s, {}, r)])
def test_no_modules_need_no_ranks(allocate):
    assert allocate({}, 4) == {}
