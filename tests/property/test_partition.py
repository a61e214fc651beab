from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.data.partition import deal
from rayfed_lora.data.partitions import _levelled, _sizes, _top_up
from rayfed_lora.recipe.data import Partition

KINDS = st.sampled_from(["iid", "dirichlet", "shards", "quantity"])


def greedy(counts: list[int], taken: int) -> list[int]:
    """Take one example at a time from the largest client, the first of them in a tie."""
    left = list(counts)
    for _ in range(taken):
        left[left.index(max(left))] -= 1
    return left


@given(
    kind=KINDS,
    clients=st.integers(1, 12),
    alpha=st.floats(0.01, 100.0),
    min_examples=st.integers(1, 4),
    extra=st.integers(0, 60),
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_example_is_dealt_exactly_once_and_no_client_is_short(
    kind, clients, alpha, min_examples, extra, classes, seed
):
    total = clients * 4 + extra
    labels = np.random.default_rng(seed).integers(0, classes, total)
    partition = Partition(
        kind=kind,
        clients=clients,
        alpha=alpha,
        min_examples=min_examples,
        shards_per_client=2,
    )
    table = deal(labels, partition, seed)

    assert table.clients == clients
    assert table.order.dtype == table.offsets.dtype == np.int64
    dealt = np.concatenate([table.examples(k) for k in range(clients)])
    np.testing.assert_array_equal(np.sort(dealt), np.arange(total))
    assert table.counts.min() >= (1 if kind in ("iid", "shards") else min_examples)
    again = deal(labels, partition, seed)
    np.testing.assert_array_equal(table.order, again.order)
    np.testing.assert_array_equal(table.offsets, again.offsets)


@given(names=st.lists(st.text(max_size=3), min_size=1, max_size=50))
def test_column_clients_hold_the_rows_of_one_value_each(names):
    partition = Partition(kind="column", column="who")
    table = deal(np.zeros(len(names), np.int64), partition, 0, names)
    expected = [[i for i, n in enumerate(names) if n == name] for name in sorted(set(names))]
    assert [table.examples(k).tolist() for k in range(table.clients)] == expected


def enough(counts: list[int], floor: int) -> list[int]:
    """Return the counts, the first one raised until there are `floor` for each."""
    return [counts[0] + max(floor * len(counts) - sum(counts), 0), *counts[1:]]


@given(
    others=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    floor=st.integers(1, 5),
    short=st.integers(0, 4),
)
def test_levelling_equals_taking_from_the_largest_one_by_one(others, floor, short):
    counts = enough([*others, min(short, floor - 1)], floor)
    missing = sum(max(floor - count, 0) for count in counts)
    assert _levelled(np.array(counts), missing, floor).tolist() == greedy(counts, missing)


@given(
    counts=st.lists(st.integers(0, 20), min_size=2, max_size=8),
    floor=st.integers(0, 5),
    seed=st.integers(0, 100),
)
def test_topping_up_moves_only_what_is_missing(counts, floor, seed):
    counts = enough(counts, floor)
    owner = np.repeat(np.arange(len(counts)), counts)
    topped = _top_up(owner, len(counts), floor, np.random.default_rng(seed))
    missing = [max(floor - count, 0) for count in counts]
    expected = np.array(greedy(counts, sum(missing))) + missing
    np.testing.assert_array_equal(np.bincount(topped, minlength=len(counts)), expected)
    assert int((topped != owner).sum()) == sum(missing)


@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=20),
    total=st.integers(0, 1000),
    offset=st.floats(0.0, 1.0, exclude_max=True),
)
def test_sizes_sum_to_the_total_and_are_less_than_one_off_their_share(weights, total, offset):
    shares = np.array(weights) / np.sum(weights)
    sizes = _sizes(total, shares, offset)
    assert sizes.sum() == total
    assert np.abs(sizes - shares * total).max() < 1 + 1e-9
