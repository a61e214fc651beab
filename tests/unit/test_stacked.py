"""States of clients that were trained together."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from rayfed_lora.lora.stacked import StackedStates, named
from rayfed_lora.types import AdapterState, Factors

# Of a client: a head of 2, A of q (2, 3), B of q (1, 2); v has no factors now.
LIKE = AdapterState(
    {
        "q": Factors(np.zeros((2, 3), np.float32), np.zeros((1, 2), np.float32), 0.5),
        "v": Factors(np.zeros((0, 3), np.float32), np.zeros((1, 0), np.float32), 0.5),
    },
    {"head": np.zeros(2, np.float32)},
)
SHAPES = {name: tensor.shape for name, tensor in named(LIKE).items()}


def stack(clients: int = 3, like: AdapterState = LIKE) -> StackedStates:
    rows = np.arange(10 * clients, dtype=np.float32).reshape(clients, 10)
    return StackedStates(rows, [like] * clients, SHAPES)


def test_a_clients_state_is_its_row() -> None:
    state = stack()[1]
    np.testing.assert_array_equal(state.dense["head"], [10, 11])
    np.testing.assert_array_equal(state.factors["q"].a, [[12, 13, 14], [15, 16, 17]])
    np.testing.assert_array_equal(state.factors["q"].b, [[18, 19]])
    assert state.factors["q"].scale == 0.5
    assert state.factors["v"].rank == 0
    assert (list(state.factors), list(state.dense)) == (["q", "v"], ["head"])


def test_a_lower_rank_is_cut_out_of_the_padding() -> None:
    low = Factors(np.zeros((1, 3), np.float32), np.zeros((1, 1), np.float32), 2.0)
    likes = [LIKE, AdapterState({"q": low, "v": LIKE.factors["v"]}, LIKE.dense)]
    found = StackedStates(stack(2).rows, likes, SHAPES)[1].factors["q"]
    np.testing.assert_array_equal(found.a, [[12, 13, 14]])
    np.testing.assert_array_equal(found.b, [[18]])
    assert found.scale == 2.0


def test_an_unknown_name_is_not_in_a_state() -> None:
    state = stack()[0]
    assert "q" not in state.dense
    with pytest.raises(KeyError, match="w"):
        state.factors["w"]


def test_states_are_taken_in_the_order_that_is_asked_for() -> None:
    whole = stack()
    found = whole.taken([2, 0])
    assert len(found) == 2
    assert [state.dense["head"].tolist() for state in found] == [[20, 21], [0, 1]]
    assert [state.dense["head"].tolist() for state in whole[1:]] == [[10, 11], [20, 21]]
    assert whole.taken([0, 1, 2]) is whole
    with pytest.raises(IndexError):
        whole[3]


def test_the_ranks_of_states_are_taken_with_them() -> None:
    low = Factors(np.zeros((1, 3), np.float32), np.zeros((1, 1), np.float32), 2.0)
    likes = [LIKE, AdapterState({"q": low}, LIKE.dense), LIKE]
    found = StackedStates(stack().rows, likes, SHAPES)
    assert [state.factors["q"].rank for state in found] == [2, 1, 2]
    assert [state.factors["q"].rank for state in found.taken([1, 0])] == [1, 2]


def test_only_states_like_one_and_the_same_are_alike() -> None:
    assert stack().alike
    # The same one, as it comes out of another process.
    again = pickle.loads(pickle.dumps(LIKE))
    assert StackedStates(stack().rows, [LIKE, again, LIKE], SHAPES).alike
    other = AdapterState(LIKE.factors, LIKE.dense)
    assert not StackedStates(stack().rows, [LIKE, LIKE, other], SHAPES).alike


def test_the_products_are_the_weighted_sums_of_the_clients_updates() -> None:
    whole, weights = stack(), np.array([2.0, 3.0])
    found = whole.taken([2, 1]).products(weights)["q"].weighted()
    expected = sum(
        w * f.scale * f.b.astype(np.float64) @ f.a.astype(np.float64)
        for w, f in zip(weights, (whole[k].factors["q"] for k in (2, 1)), strict=True)
    )
    np.testing.assert_allclose(found[0] @ found[1], expected, rtol=1e-12)
    b, a = whole[:1].products(weights[:1])["v"].weighted()
    assert (b.shape, a.shape) == ((1, 0), (0, 3))
