from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.data.client_table import ClientTable, hold_out
from rayfed_lora.data.partition import deal
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Partition

LABELS = np.random.default_rng(0).integers(0, 10, 2000)


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_held_out_examples_are_a_clients_own_and_leave_it_some(counts, fraction, seed):
    order = np.random.default_rng(seed).permutation(sum(counts))
    table = ClientTable(order, np.cumsum([0, *counts]))
    kept, held = hold_out(table, fraction, seed)
    assert held is not None
    for client, count in enumerate(counts):
        own, tested = kept.examples(client), held.examples(client)
        assert sorted([*own, *tested]) == sorted(table.examples(client))
        assert len(tested) == (
            0 if count < 2 else min(max(int(count * fraction + 0.5), 1), count - 1)
        )
    again = hold_out(table, fraction, seed)[1]
    np.testing.assert_array_equal(again.order, held.order)


def test_what_a_client_holds_out_does_not_depend_on_the_other_clients():
    alone = ClientTable(np.arange(8), np.array([0, 8]))
    with_others = ClientTable(np.arange(20), np.array([0, 8, 15, 20]))
    one, other = (hold_out(table, 0.3, 4)[1] for table in (alone, with_others))
    np.testing.assert_array_equal(one.examples(0), other.examples(0))


def test_nothing_is_held_out_unless_asked():
    table = ClientTable(np.arange(8), np.array([0, 8]))
    assert hold_out(table, 0.0, 0) == (table, None)


def shares(table: ClientTable, labels: np.ndarray) -> np.ndarray:
    """Return each client's share of every label, clients x labels."""
    rows = [np.bincount(labels[table.examples(k)], minlength=10) for k in range(table.clients)]
    return np.array(rows) / table.counts[:, None]


def test_a_client_table_gives_the_rows_between_its_offsets():
    table = ClientTable(np.array([4, 0, 2, 1, 3]), np.array([0, 1, 1, 5]))
    assert table.clients == 3
    assert table.counts.tolist() == [1, 0, 4]
    assert [table.examples(k).tolist() for k in range(3)] == [[4], [], [0, 2, 1, 3]]


@pytest.mark.parametrize("client", [-1, 3])
def test_a_client_that_is_not_there_is_an_index_error(client):
    table = ClientTable(np.arange(3), np.arange(4))
    with pytest.raises(IndexError, match=f"from 0 to 2, got {client}"):
        table.examples(client)


def test_iid_clients_differ_by_one_example_at_most_and_look_like_the_whole():
    table = deal(LABELS, Partition(kind="iid", clients=7), 0)
    # 2000 = 7 * 285 + 5
    assert sorted(table.counts.tolist()) == [285, 285, 286, 286, 286, 286, 286]
    whole = np.bincount(LABELS) / len(LABELS)
    # standard error of a share of 0.1 in 285 examples: sqrt(0.1 * 0.9 / 285) = 0.018
    assert np.abs(shares(table, LABELS) - whole).max() < 5 * 0.018


def test_shards_give_each_client_few_labels_and_equally_many_examples():
    labels = np.repeat(np.arange(10), 100)
    table = deal(labels, Partition(kind="shards", clients=10, shards_per_client=2), 0)
    # 20 pieces of 50: each within one label, so two labels a client at most
    assert table.counts.tolist() == [100] * 10
    assert all(len(np.unique(labels[table.examples(k)])) <= 2 for k in range(10))


def test_dirichlet_is_more_skewed_the_smaller_alpha_is():
    def skew(alpha: float) -> float:
        table = deal(LABELS, Partition(alpha=alpha, clients=20, min_examples=1), 0)
        return float(shares(table, LABELS).max(axis=1).mean())

    assert skew(0.05) > 0.6 > skew(1.0) > skew(100.0)
    assert skew(100.0) < 0.2  # even: 0.1


def test_dirichlet_shares_of_a_label_have_the_variance_of_the_distribution():
    labels = np.zeros(400_000, dtype=np.int64)
    clients, alpha = 400, 0.5
    counts = deal(labels, Partition(alpha=alpha, clients=clients, min_examples=1), 3).counts
    # Var = (1/K) (1 - 1/K) / (K alpha + 1); the estimate from 400 draws is good to about 20 %
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.var(counts / len(labels)) == pytest.approx(expected, rel=0.4)


def test_quantity_skews_sizes_but_not_labels():
    table = deal(LABELS, Partition(kind="quantity", alpha=0.5, clients=10, min_examples=1), 1)
    assert table.counts.max() > 3 * table.counts.min()
    large = table.counts > 200
    whole = np.bincount(LABELS) / len(LABELS)
    # standard error of a share of 0.1 in 200 examples: 0.021
    assert np.abs(shares(table, LABELS)[large] - whole).max() < 5 * 0.021


def test_column_makes_one_client_of_each_value_in_sorted_order():
    table = deal(
        np.array([0, 1, 0, 1, 0]),
        Partition(kind="column", column="author"),
        0,
        column=["mia", "bob", "mia", "al", "bob"],
    )
    assert [table.examples(k).tolist() for k in range(table.clients)] == [[3], [1, 4], [0, 2]]


@pytest.mark.parametrize("column", [None, ["a", "b"]])
def test_column_without_a_value_for_each_row_is_refused(column):
    with pytest.raises(ValueError, match="each of the 3 rows"):
        deal(np.array([0, 1, 0]), Partition(kind="column", column="author"), 0, column)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_too_few_examples_for_the_minimum_is_an_error_with_both_numbers(kind):
    with pytest.raises(DataError, match=r"10 clients .* min_examples 4 need 40 .* got 39"):
        deal(LABELS[:39], Partition(kind=kind, clients=10, min_examples=4), 0)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_exactly_enough_examples_for_the_minimum_give_every_client_the_minimum(kind):
    table = deal(LABELS[:40], Partition(kind=kind, clients=10, min_examples=4, alpha=0.05), 0)
    assert table.counts.tolist() == [4] * 10


def test_more_clients_than_examples_is_an_error_that_counts_and_names_the_empty_ones():
    with pytest.raises(DataError, match=r"leaves 7 of 10 clients .* 3 training") as caught:
        deal(LABELS[:3], Partition(kind="iid", clients=10), 0)
    assert "at most 3" in str(caught.value)
    assert ", ...)" in str(caught.value)


def test_a_client_left_empty_by_label_skew_is_an_error_that_says_what_to_change():
    with pytest.raises(DataError, match=r"without an example .*min_examples` to at least 1"):
        deal(LABELS, Partition(alpha=0.01, clients=100, min_examples=0), 0)


def test_more_shards_than_examples_is_an_error_that_names_their_product():
    with pytest.raises(DataError, match=r"clients \* shards_per_client at 20 or below"):
        deal(LABELS[:20], Partition(kind="shards", clients=15, shards_per_client=20), 0)


def test_nothing_to_deal_is_an_error():
    with pytest.raises(DataError, match="got none"):
        deal(LABELS[:0], Partition(kind="iid"), 0)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "quantity"])
def test_the_seed_alone_decides_who_gets_what(kind):
    partition = Partition(kind=kind, clients=20)
    one, same, other = (deal(LABELS, partition, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.order, same.order)
    np.testing.assert_array_equal(one.offsets, same.offsets)
    assert not np.array_equal(one.order, other.order)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "quantity"])
def test_clients_without_number_are_refused_before_there_is_an_array_of_them(kind):
    partition = Partition(kind=kind, clients=10**13, min_examples=0)
    with pytest.raises(DataError, match=r"10,000,000,000,000 clients .* got 30.* at most 30"):
        deal(np.zeros(30, np.int64), partition, 0)


def test_pieces_without_number_are_refused_before_there_is_an_array_of_them():
    partition = Partition(kind="shards", clients=3, shards_per_client=10**12)
    with pytest.raises(DataError, match=r"shards_per_client\) need 3,000,000,000,000 .* at 30 or"):
        deal(np.zeros(30, np.int64), partition, 0)


def test_whole_numbers_that_name_clients_are_dealt_in_their_order():
    column = ["10", "2", "1", "10", "2"]
    table = deal(np.zeros(5, np.int64), Partition(kind="column", column="who"), 0, column)
    assert [table.examples(k).tolist() for k in range(3)] == [[2], [1, 4], [0, 3]]
