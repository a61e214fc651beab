"""Who takes part in a round, and in which blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.federation import sampling
from rayfed_lora.federation.sampling import BlockSize, ClientHistory, block_size, blocks
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import ModelShape
from tests.fakes import SHAPE, make_recipe


def cohort(recipe: Recipe, clients: int, t: int) -> tuple[int, ...]:
    return sampling.cohort(recipe, ClientHistory.empty(np.ones(clients, np.int64)), t)


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
def test_blocks_of_a_size_put_together_are_the_cohort_and_only_the_last_is_smaller(members, size):
    drawn = tuple(sorted(members))
    cut = blocks(drawn, BlockSize(size, even=False))
    assert tuple(client for block in cut for client in block) == drawn
    assert all(len(block) == size for block in cut[:-1])
    assert 1 <= len(cut[-1]) <= size


@given(members=st.sets(st.integers(0, 500), min_size=1), size=st.integers(1, 600))
def test_even_blocks_put_together_are_the_cohort_and_differ_by_one_at_most(members, size):
    drawn = tuple(sorted(members))
    cut = blocks(drawn, BlockSize(size, even=True))
    assert tuple(client for block in cut for client in block) == drawn
    sizes = [len(block) for block in cut]
    assert 1 <= min(sizes) <= max(sizes) <= min(min(sizes) + 1, size)


def sized(flops: float, held: int = 1000, obstacle: str | None = None) -> ModelShape:
    return replace(SHAPE, linear_flops=flops, activation_bytes=held, obstacle=obstacle)


@pytest.mark.parametrize(
    ("flops", "held", "clients", "size"),
    [
        # A batch of 10 of 8e5 is 8e6: ten of them are the 8e7 that a CPU wants.
        (8e5, 1000, 100, 10),
        (8e6, 1000, 100, 1),  # one is enough
        (1e3, 1000, 200, 25),  # 32 at most: 7 blocks, rounded up to 8, of 25 clients
        # 3 * 1e7 bytes * 10 examples = 0.3 of the 1 GB that a block may hold
        (1e3, 10**7, 100, 3),
        (2e5, 1000, 8, 2),  # four blocks at least, for several actors to share
        (2e5, 1000, 3, 1),
        (2e5, 1000, 20, 5),
    ],
)
def test_an_automatic_block_is_as_large_as_its_work_and_memory_ask_for(flops, held, clients, size):
    recipe = make_recipe(clients__batch_size=10)
    found = block_size(recipe, sized(flops, held), clients, "cpu")
    assert (found.clients, found.even) == (size, True)
    assert found.reason.startswith(f"{size} client")


def test_it_is_said_where_blocks_are_smaller_for_more_actors_to_share():
    recipe = make_recipe(clients__batch_size=10)
    told = "4 blocks a round for actors to share: with fewer of them, larger blocks"
    assert told in block_size(recipe, sized(2e5), 20, "cpu").reason
    for clients in (200, 4):
        assert told not in block_size(recipe, sized(8e6), clients, "cpu").reason


def test_a_gpu_takes_larger_blocks_than_a_cpu():
    recipe = make_recipe(clients__batch_size=10)
    assert block_size(recipe, sized(2e5), 1000, "cuda").clients > 32


def test_a_block_of_a_given_size_is_kept_and_says_where_it_comes_from():
    found = block_size(make_recipe(runtime__cohort_size=7), sized(2e5), 20, "cpu")
    assert (found.clients, found.even) == (7, False)
    assert "runtime.cohort_size" in found.reason


@pytest.mark.parametrize("cohort_size", [7, "auto"])
def test_an_obstacle_leaves_one_client_at_a_time_and_is_named(cohort_size):
    recipe = make_recipe(runtime__cohort_size=cohort_size)
    found = block_size(recipe, sized(2e5, obstacle="norm over the batch"), 20, "cpu")
    assert (found.clients, found.reason) == (1, "one client at a time: norm over the batch")


def test_a_model_that_cannot_be_traced_is_trained_one_client_at_a_time():
    assert block_size(make_recipe(), sized(0.0), 20, "cpu").clients == 1
