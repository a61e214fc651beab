"""Who takes part in a round, and in which blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.federation.sampling import blocks, cohort
from tests.fakes import make_recipe


@given(seed=st.integers(0, 2**32), t=st.integers(0, 1000), per_round=st.integers(1, 6))
def test_a_cohort_has_the_asked_size_no_client_twice_and_rising_order(seed, t, per_round):
    drawn = cohort(make_recipe(seed=seed, clients__per_round=per_round), 6, t)
    assert len(drawn) == len(set(drawn)) == per_round
    assert list(drawn) == sorted(drawn)
    assert set(drawn) <= set(range(6))
    assert all(type(client) is int for client in drawn)


def test_all_clients_take_part_where_all_are_asked_for():
    assert cohort(make_recipe(clients__per_round=1.0), 6, 0) == (0, 1, 2, 3, 4, 5)


def test_a_share_is_rounded_to_the_nearest_count_and_at_least_one():
    # 0.25 * 6 = 1.5, rounded half up; 0.01 * 6 = 0.06.
    assert len(cohort(make_recipe(clients__per_round=0.25), 6, 0)) == 2
    assert len(cohort(make_recipe(clients__per_round=0.01), 6, 0)) == 1


def test_the_same_seed_and_round_draw_the_same_cohort_and_others_draw_others():
    recipe = make_recipe(seed=1, clients__per_round=3)
    drawn = [cohort(recipe, 100, t) for t in range(8)]
    assert drawn == [cohort(recipe, 100, t) for t in range(8)]
    assert len(set(drawn)) == 8
    assert drawn != [cohort(make_recipe(seed=2, clients__per_round=3), 100, t) for t in range(8)]


def test_a_cohort_does_not_depend_on_how_clients_train_or_where():
    one = make_recipe(seed=1)
    other = make_recipe(seed=1, clients__batch_size=3, runtime__cohort_size=2)
    assert cohort(one, 6, 4) == cohort(other, 6, 4)


def test_every_client_is_drawn_equally_often():
    # 2000 rounds of 3 of 6: each client 1000 times; the standard deviation is sqrt(2000 / 4) = 22.
    recipe = make_recipe(seed=0, clients__per_round=3)
    counts = np.bincount([client for t in range(2000) for client in cohort(recipe, 6, t)])
    assert np.abs(counts - 1000).max() < 5 * 22.4


@given(members=st.sets(st.integers(0, 500), min_size=1), size=st.integers(1, 600))
def test_blocks_put_together_are_the_cohort_and_only_the_last_is_smaller(members, size):
    drawn = tuple(sorted(members))
    cut = blocks(drawn, size)
    assert tuple(client for block in cut for client in block) == drawn
    assert all(len(block) == size for block in cut[:-1])
    assert 1 <= len(cut[-1]) <= size


@pytest.mark.parametrize(
    ("clients", "size", "count"), [(1, 1, 1), (64, 1, 64), (65, 2, 33), (128, 2, 64), (129, 3, 43)]
)
def test_auto_makes_64_blocks_at_most_of_the_smallest_size_that_does(clients, size, count):
    cut = blocks(tuple(range(clients)), "auto")
    assert (len(cut[0]), len(cut)) == (size, count)
