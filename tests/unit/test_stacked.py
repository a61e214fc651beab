"""States of clients that were trained together."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayfed_lora.aggregation.means import Means
from rayfed_lora.lora.stacked import StackedStates, named, together
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
    state = stack().state(1)
    np.testing.assert_array_equal(state.dense["head"], [10, 11])
    np.testing.assert_array_equal(state.factors["q"].a, [[12, 13, 14], [15, 16, 17]])
    np.testing.assert_array_equal(state.factors["q"].b, [[18, 19]])
    assert state.factors["q"].scale == 0.5
    assert state.factors["v"].rank == 0
    assert (list(state.factors), list(state.dense)) == (["q", "v"], ["head"])


def test_a_lower_rank_is_cut_out_of_the_padding() -> None:
    low = Factors(np.zeros((1, 3), np.float32), np.zeros((1, 1), np.float32), 2.0)
    likes = [LIKE, AdapterState({"q": low, "v": LIKE.factors["v"]}, LIKE.dense)]
    found = StackedStates(stack(2).rows, likes, SHAPES).state(1).factors["q"]
    np.testing.assert_array_equal(found.a, [[12, 13, 14]])
    np.testing.assert_array_equal(found.b, [[18]])
    assert found.scale == 2.0


def test_an_unknown_name_is_not_in_a_state() -> None:
    state = stack().state(0)
    assert "q" not in state.dense
    with pytest.raises(KeyError, match="w"):
        state.factors["w"]


def test_a_state_is_sent_without_the_others_of_its_stack() -> None:
    whole = stack(1000)
    sent = pickle.dumps(whole.state(7))
    assert len(sent) < 2_000 < whole.rows.nbytes
    np.testing.assert_array_equal(pickle.loads(sent).factors["q"].b, whole.state(7).factors["q"].b)


def test_only_states_of_one_stack_of_equal_ranks_are_together() -> None:
    one, other = stack(), stack()
    found = together([one.state(2), one.state(0)])
    assert found is not None
    assert found[0] is one
    assert found[1] == [2, 0]
    assert together([]) is None
    assert together([LIKE, one.state(0)]) is None
    assert together([one.state(0), other.state(1)]) is None
    mixed = StackedStates(one.rows, [LIKE, LIKE, AdapterState(LIKE.factors, LIKE.dense)], SHAPES)
    assert together([mixed.state(0), mixed.state(1)]) is None


def test_the_products_are_the_weighted_sums_of_the_clients_updates() -> None:
    whole, weights = stack(), np.array([2.0, 3.0])
    found = whole.products([2, 1], weights)["q"].weighted()
    expected = sum(
        w * f.scale * f.b.astype(np.float64) @ f.a.astype(np.float64)
        for w, f in zip(weights, (whole.state(k).factors["q"] for k in (2, 1)), strict=True)
    )
    np.testing.assert_allclose(found[0] @ found[1], expected, rtol=1e-12)
    b, a = whole.products([0], weights[:1])["v"].weighted()
    assert (b.shape, a.shape) == ((1, 0), (0, 3))


def clipped(state: AdapterState) -> AdapterState:
    """Return what a user's hook makes of an update: other factors on the old head."""
    half = {name: replace(f, b=f.b / 2) for name, f in state.factors.items()}
    return replace(state, factors=half)


def test_a_state_with_other_factors_or_another_head_is_not_of_the_stack() -> None:
    one, other = stack(), stack()
    first, second = one.state(0), one.state(1)
    for changed in (
        clipped(first),
        replace(first, dense=dict(first.dense)),
        replace(first, factors=second.factors),
        replace(first, factors=other.state(0).factors),
        AdapterState(first.dense, first.dense),  # type: ignore[arg-type]
    ):
        assert together([changed, second]) is None
        assert together([second, changed]) is None


@pytest.mark.parametrize("kept", [frozenset(), frozenset({"factors"}), frozenset({"padded"})])
def test_replaced_factors_are_summed_as_what_they_are(kept: frozenset) -> None:
    one = stack(2)
    means = Means(kept)
    means.add_all([(1.0, clipped(one.state(0))), (3.0, one.state(1))])
    b, a = means.product("q")
    # 0.5 B A: of client 0 with half of B = (8, 9), of client 1 with B = (18, 19).
    first = 0.5 * np.array([[4.0, 4.5]]) @ np.array([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
    second = 0.5 * np.array([[18.0, 19.0]]) @ np.array([[12.0, 13.0, 14.0], [15.0, 16.0, 17.0]])
    np.testing.assert_allclose(b @ a, (first + 3 * second) / 4, rtol=1e-12)
    np.testing.assert_array_equal(means.tensors()["head"], [(0 + 3 * 10) / 4, (1 + 3 * 11) / 4])
