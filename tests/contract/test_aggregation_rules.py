"""What every aggregation rule owes, and each rule against dense numpy."""

from __future__ import annotations

import pickle
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.aggregation.mean import ProductMean, TensorMean
from rayfed_lora.aggregation.rules import RULES, RuleEntry
from rayfed_lora.aggregation.step import relative_error
from rayfed_lora.recipe import Aggregation
from rayfed_lora.types import AdapterState, Factors

SHAPES = {"q": (6, 5), "v": (4, 7)}  # (d_out, d_in)
SCALES = {"q": 2.0, "v": 0.5}
factor_average = RULES["factor-average"].aggregate
product_svd = RULES["product-svd"].aggregate
Updates = list[tuple[float, AdapterState]]


@dataclass(frozen=True)
class Named:
    name: str
    entry: RuleEntry


@pytest.fixture(params=list(RULES))
def rule(request: pytest.FixtureRequest) -> Named:
    return Named(request.param, RULES[request.param])


@pytest.fixture(params=[name for name, entry in RULES.items() if entry.mixed_ranks])
def mixed_rule(request: pytest.FixtureRequest) -> Named:
    return Named(request.param, RULES[request.param])


def state(seed: int, rank: int = 3, head: bool = True) -> AdapterState:
    """A trained adapter with a head, whose arrays cannot be written to (as from Ray's store)."""
    draw = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        values = draw.normal(size=shape).astype(np.float32)
        values.flags.writeable = False
        return values

    factors = {
        m: Factors(array(rank, d_in), array(d_out, rank), SCALES[m])
        for m, (d_out, d_in) in SHAPES.items()
    }
    return AdapterState(
        factors, {"head.weight": array(3, 5), "head.bias": array(3)} if head else {}
    )


def clients(count: int, ranks: Sequence[int] = (3,)) -> Updates:
    return [(float(2 + k), state(100 + k, ranks[k % len(ranks)])) for k in range(count)]


def stream(updates: Updates) -> Iterator[tuple[float, AdapterState]]:
    """Hand the updates out once, as the executor does."""
    yield from updates


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))


def dense_mean(updates: Updates, module: str) -> np.ndarray:
    total = sum(w for w, _ in updates)
    return sum(w / total * dense(s.factors[module]) for w, s in updates)


def plain_mean(updates: Updates, tensor: Callable[[AdapterState], np.ndarray]) -> np.ndarray:
    total = sum(w for w, _ in updates)
    return sum(w / total * tensor(s).astype(np.float64) for w, s in updates)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def assert_same_update(got: AdapterState, expected: dict[str, np.ndarray], atol: float = 1e-5):
    assert list(got.factors) == list(expected)
    for module, matrix in expected.items():
        np.testing.assert_allclose(dense(got.factors[module]), matrix, atol=atol)


# What every rule owes.


def test_the_rules_are_those_that_a_recipe_can_name():
    named = typing.get_args(Aggregation.model_fields["rule"].annotation)
    assert set(RULES) == set(named)
    assert len(named) == len(set(named))


def test_every_rule_names_its_paper(rule):
    year_month, number = rule.entry.source.split(".")
    assert (len(year_month), len(number)) == (4, 5)
    assert (year_month + number).isdigit()


def test_equal_clients_give_their_update_back(rule):
    trained = state(7)
    updates = [(w, trained) for w in (1.0, 5.0, 2.5)]
    got = rule.entry.aggregate(state(1), stream(updates), 1.0)
    assert_same_update(got.state, {m: dense(f) for m, f in trained.factors.items()})
    for name, tensor in trained.dense.items():
        np.testing.assert_allclose(got.state.dense[name], tensor, rtol=1e-6)
    assert got.error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (3,), (2, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_blocks_reduced_apart_and_joined_give_the_rule_on_all_clients(rule, cuts):
    updates, start = clients(8), state(1)
    whole = rule.entry.aggregate(start, stream(updates), 0.5)
    joined = rule.entry.reduction()
    for low, high in zip((0, *cuts), (*cuts, 8), strict=True):
        part = rule.entry.reduction()
        for weight, update in updates[low:high]:
            part.add(weight, update)
        # as it comes out of Ray's object store
        joined.join(pickle.loads(pickle.dumps(part)))
    got = joined.aggregate(start, 0.5)
    assert_same_update(got.state, {m: dense(f) for m, f in whole.state.factors.items()})
    for name, tensor in whole.state.dense.items():
        np.testing.assert_allclose(got.state.dense[name], tensor, rtol=1e-6)
    assert got.error == pytest.approx(whole.error, abs=1e-9)


def test_joining_changes_nothing_in_what_is_joined(rule):
    parts = [rule.entry.reduction() for _ in range(2)]
    for part, (weight, update) in zip(parts, clients(2), strict=True):
        part.add(weight, update)
    before = pickle.dumps(parts)
    joined = rule.entry.reduction()
    for part in (*parts, *parts):
        joined.join(part)
    assert pickle.dumps(parts) == before


def test_one_client_is_taken_as_it_is(rule):
    trained = state(8)
    got = rule.entry.aggregate(state(1), stream([(13.0, trained)]), 1.0)
    assert_same_update(got.state, {m: dense(f) for m, f in trained.factors.items()})
    assert got.error == pytest.approx(0, abs=1e-6)


def test_dense_tensors_are_averaged_by_weight(rule):
    def with_head(value: float) -> AdapterState:
        return AdapterState({}, {"bias": np.full(2, value, np.float32)})

    # (3 * 2 + 1 * 6) / 4 = 3
    updates = [(3.0, with_head(2.0)), (1.0, with_head(6.0))]
    got = rule.entry.aggregate(with_head(1.0), stream(updates), 1.0)
    np.testing.assert_array_equal(got.state.dense["bias"], [3.0, 3.0])
    # a server step of 0.5 from 1 towards 3, and one of 2 beyond it
    for lr, expected in ((0.5, 2.0), (2.0, 5.0)):
        got = rule.entry.aggregate(with_head(1.0), stream(updates), lr)
        np.testing.assert_array_equal(got.state.dense["bias"], [expected, expected])


def test_a_state_without_factors_is_plain_fedavg_and_has_no_aggregation_error(rule):
    updates = [(w, AdapterState({}, s.dense)) for w, s in clients(4)]
    got = rule.entry.aggregate(AdapterState({}, state(1).dense), stream(updates), 1.0)
    assert got.error is None
    assert got.state.factors == {}
    for name in ("head.weight", "head.bias"):
        expected = plain_mean(updates, lambda s, name=name: s.dense[name])
        np.testing.assert_allclose(got.state.dense[name], expected, atol=1e-6)


@pytest.mark.parametrize("lr", [0.25, 1.0, 1.5])
def test_clients_that_have_not_moved_leave_the_update_where_it_was(rule, lr):
    start = state(1)
    got = rule.entry.aggregate(start, stream([(2.0, start), (3.0, start)]), lr)
    assert_same_update(got.state, {m: dense(f) for m, f in start.factors.items()})
    for name, tensor in start.dense.items():
        np.testing.assert_allclose(got.state.dense[name], tensor, rtol=1e-6)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_the_next_state_has_the_names_ranks_scales_and_precision_of_the_start(rule, lr):
    start = state(1)
    got = rule.entry.aggregate(start, stream(clients(3)), lr).state
    assert list(got.factors) == list(start.factors)
    assert list(got.dense) == list(start.dense)
    for module, f in got.factors.items():
        old = start.factors[module]
        assert (f.a.shape, f.b.shape, f.scale) == (old.a.shape, old.b.shape, old.scale)
        assert (f.a.dtype, f.b.dtype) == (np.float32, np.float32)
    for name, tensor in got.dense.items():
        assert (tensor.shape, tensor.dtype) == (start.dense[name].shape, np.float32)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_the_order_of_arrival_changes_nothing_but_rounding(rule, lr):
    start, updates = state(1), clients(6)
    got = rule.entry.aggregate(start, stream(updates), lr)
    turned = rule.entry.aggregate(start, stream(updates[::-1]), lr)
    assert_same_update(turned.state, {m: dense(f) for m, f in got.state.factors.items()})
    for name, tensor in got.state.dense.items():
        np.testing.assert_allclose(turned.state.dense[name], tensor, atol=1e-6)
    assert turned.error == pytest.approx(got.error, abs=1e-6)


def test_the_unit_of_the_weights_does_not_matter(rule):
    start, updates = state(1), clients(4)
    got = rule.entry.aggregate(start, stream(updates), 1.0)
    scaled = rule.entry.aggregate(start, stream([(w * 1000, s) for w, s in updates]), 1.0)
    assert_same_update(scaled.state, {m: dense(f) for m, f in got.state.factors.items()})
    assert scaled.error == pytest.approx(got.error, abs=1e-6)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_no_input_is_written_to(rule, lr):
    start, updates = state(1), clients(3)
    states = [start, *(s for _, s in updates)]
    before = [
        [(f.a.copy(), f.b.copy()) for f in s.factors.values()]
        + [(t.copy(), t.copy()) for t in s.dense.values()]
        for s in states
    ]
    rule.entry.aggregate(start, stream(updates), lr)
    for s, copies in zip(states, before, strict=True):
        now = [(f.a, f.b) for f in s.factors.values()] + [(t, t) for t in s.dense.values()]
        for (x, y), (x0, y0) in zip(now, copies, strict=True):
            np.testing.assert_array_equal(x, x0)
            np.testing.assert_array_equal(y, y0)


def test_the_error_is_the_distance_from_the_exact_mean_of_the_updates(rule):
    updates = clients(5)
    got = rule.entry.aggregate(state(1), stream(updates), 1.0)
    exact = {m: dense_mean(updates, m) for m in SHAPES}
    apart = sum(np.linalg.norm(dense(got.state.factors[m]) - exact[m]) ** 2 for m in SHAPES)
    size = sum(np.linalg.norm(exact[m]) ** 2 for m in SHAPES)
    assert got.error == pytest.approx(np.sqrt(apart / size), rel=1e-5)
    assert got.error > 0.1  # five clients of rank 3 are no update of rank 3


def test_an_adapter_of_rank_zero_has_nothing_to_average(rule):
    got = rule.entry.aggregate(state(1, rank=0), stream(clients(3, ranks=[0])), 1.0)
    for module, (d_out, d_in) in SHAPES.items():
        assert got.state.factors[module].a.shape == (0, d_in)
        assert got.state.factors[module].b.shape == (d_out, 0)
    assert got.error == 0.0


def test_a_rank_above_what_a_matrix_can_have_is_kept(rule):
    trained = state(9, rank=9)
    got = rule.entry.aggregate(state(1, rank=9), stream([(1.0, trained), (2.0, trained)]), 1.0)
    assert {f.rank for f in got.state.factors.values()} == {9}
    assert_same_update(got.state, {m: dense(f) for m, f in trained.factors.items()}, atol=3e-5)
    # every direction can still be trained: no row of A is zero
    for f in got.state.factors.values():
        assert np.all(np.linalg.norm(f.a, axis=1) > 0)


def test_clients_of_different_ranks_and_scales_are_averaged_exactly(mixed_rule):
    updates = clients(4, ranks=[1, 4, 0, 2])
    _, fourth = updates[3]
    rescaled = {m: Factors(f.a, f.b, 3.0) for m, f in fourth.factors.items()}
    updates[3] = (4.5, AdapterState(rescaled, fourth.dense))
    start = state(1, rank=7)  # room for the 1 + 4 + 0 + 2 directions there are
    got = mixed_rule.entry.aggregate(start, stream(updates), 1.0)
    assert_same_update(got.state, {m: dense_mean(updates, m) for m in SHAPES})
    assert {f.rank for f in got.state.factors.values()} == {7}
    assert got.error == pytest.approx(0, abs=1e-6)


# factor-average: the means of A and of B apart.


def test_factor_average_is_the_mean_of_a_and_the_mean_of_b():
    updates = clients(5)
    got = factor_average(state(1), stream(updates)).state
    for m in SHAPES:
        mean_a = plain_mean(updates, lambda s, m=m: s.factors[m].a)
        mean_b = plain_mean(updates, lambda s, m=m: s.factors[m].b)
        np.testing.assert_allclose(got.factors[m].a, mean_a, atol=1e-6)
        np.testing.assert_allclose(got.factors[m].b, mean_b, atol=1e-6)


@pytest.mark.parametrize("lr", [0.5, 1.5])
def test_factor_average_steps_each_factor_towards_its_mean(lr):
    start, updates = state(1), clients(3)
    got = factor_average(start, stream(updates), lr).state
    for m, old in start.factors.items():
        mean_a = plain_mean(updates, lambda s, m=m: s.factors[m].a)
        mean_b = plain_mean(updates, lambda s, m=m: s.factors[m].b)
        np.testing.assert_allclose(got.factors[m].a, (1 - lr) * old.a + lr * mean_a, atol=1e-6)
        np.testing.assert_allclose(got.factors[m].b, (1 - lr) * old.b + lr * mean_b, atol=1e-6)


def scalar(a: float, b: float) -> AdapterState:
    one = Factors(np.full((1, 1), a, np.float32), np.full((1, 1), b, np.float32), 1.0)
    return AdapterState({"q": one}, {})


def test_factor_average_is_biased_by_the_covariance_of_a_and_b():
    # clients (A, B) = (1, 1) and (3, 3): means 2 * 2 = 4, mean of products (1 + 9) / 2 = 5
    got = factor_average(scalar(0, 0), stream([(1.0, scalar(1, 1)), (1.0, scalar(3, 3))]))
    assert dense(got.state.factors["q"]).item() == 4.0
    assert got.error == pytest.approx(1 / 5)


def test_factor_average_does_not_average_factors_of_different_ranks():
    with pytest.raises(ValueError, match=r"rank|shape"):
        factor_average(state(1), stream([(1.0, state(2)), (1.0, state(3, rank=1))]))


# product-svd: the exact mean of the products, cut back to the rank.


@pytest.mark.parametrize("count", [2, 5, 30])
def test_product_svd_is_the_dense_mean_cut_by_the_dense_svd(count):
    updates = clients(count)
    got = product_svd(state(1), stream(updates)).state
    assert_same_update(got, {m: best_of_rank(dense_mean(updates, m), 3) for m in SHAPES})


@pytest.mark.parametrize("lr", [0.5, 1.5])
def test_product_svd_steps_the_update_and_then_cuts_it(lr):
    start, updates = state(1), clients(4)
    got = product_svd(start, stream(updates), lr).state
    expected = {
        m: best_of_rank((1 - lr) * dense(f) + lr * dense_mean(updates, m), 3)
        for m, f in start.factors.items()
    }
    assert_same_update(got, expected)


def test_product_svd_cuts_to_the_rank_of_the_start_however_many_ranks_the_clients_have():
    updates = clients(3, ranks=[4, 2, 3])
    got = product_svd(state(1, rank=2), stream(updates)).state
    assert_same_update(got, {m: best_of_rank(dense_mean(updates, m), 2) for m in SHAPES})


def two_axes() -> tuple[AdapterState, Updates]:
    """A start of D = 0 and rank 1, and clients whose mean update is diag(2, 1)."""

    def axis(i: int, value: float) -> AdapterState:
        a, b = np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32)
        a[0, i], b[i, 0] = 1.0, value
        return AdapterState({"q": Factors(a, b, 1.0)}, {})

    return axis(0, 0.0), [(1.0, axis(0, 4.0)), (1.0, axis(1, 2.0))]


def test_the_error_of_product_svd_is_what_it_cuts_off():
    start, updates = two_axes()
    # diag(2, 1) without its 1: 1 / sqrt(4 + 1)
    assert product_svd(start, stream(updates)).error == pytest.approx(1 / np.sqrt(5))


def test_the_error_of_product_svd_is_what_it_cuts_off_with_a_server_step_too():
    start, updates = two_axes()
    # half a step from 0: diag(1, 0.5) without its 0.5 is the same share
    assert product_svd(start, stream(updates), 0.5).error == pytest.approx(1 / np.sqrt(5))


# The error, and the two running means.


def test_the_error_of_updates_that_are_all_zero_is_zero():
    zero = (np.zeros((2, 1)), np.ones((1, 3)))
    assert relative_error({"q": zero}, {"q": zero}) == 0.0


def test_an_update_where_the_exact_mean_vanishes_is_not_called_exact():
    # (A, B) = (1, 1) and (2, -1/2): products 1 and -1 cancel, the means give 1.5 * 0.25 = 0.375
    updates = [(1.0, scalar(1, 1)), (1.0, scalar(2, -0.5))]
    got = factor_average(scalar(0, 0), stream(updates))
    assert dense(got.state.factors["q"]).item() == 0.375
    assert got.error != 0.0


def test_the_error_is_taken_over_all_modules_together():
    one = np.ones((1, 1))
    used = {"q": (3 * one, one), "v": (2 * one, one)}
    exact = {"q": (3 * one, one), "v": (6 * one, -one)}
    # apart: 0 and 8; exact: 3 and 6
    assert relative_error(used, exact) == pytest.approx(8 / np.sqrt(9 + 36))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    rank=st.integers(0, 6),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_product_mean_is_the_dense_mean_for_any_number_of_clients(count, rank, size, seed):
    draw = np.random.default_rng(seed)
    mean, total, weights = ProductMean(), np.zeros(size), 0.0
    for _ in range(count):
        weight = float(draw.integers(1, 50))
        a = draw.normal(size=(rank, size[1])).astype(np.float32)
        b = draw.normal(size=(size[0], rank)).astype(np.float32)
        mean.add(weight, Factors(a, b, 2.0))
        total += weight * 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
        weights += weight
    b_mean, a_mean = mean.mean()
    np.testing.assert_allclose(b_mean @ a_mean, total / weights, atol=1e-11)


def test_a_product_mean_of_five_hundred_clients_holds_no_more_than_a_few_and_is_exact():
    draw = np.random.default_rng(3)
    d_out, d_in, rank, widest = 12, 10, 4, 0
    mean, total = ProductMean(), np.zeros((d_out, d_in))
    for k in range(500):
        a = draw.normal(size=(rank, d_in)).astype(np.float32)
        b = draw.normal(size=(d_out, rank)).astype(np.float32)
        mean.add(k + 1, Factors(a, b, 0.5))
        total += (k + 1) * 0.5 * (b.astype(np.float64) @ a.astype(np.float64))
        held_b, held_a = mean.mean()
        widest = max(widest, held_b.shape[1], held_a.shape[0])
    assert widest <= 2 * min(d_out, d_in) + rank
    np.testing.assert_allclose(held_b @ held_a, total / (500 * 501 / 2), atol=1e-12)


def test_a_tensor_mean_is_taken_in_double_precision():
    # in float32 16777216 + 1 is 16777216, and the mean would lose the ones
    mean = TensorMean()
    mean.add(1.0, {"x": np.array([16777216.0], np.float32)})
    for _ in range(3):
        mean.add(1.0, {"x": np.array([1.0], np.float32)})
    np.testing.assert_array_equal(mean.mean()["x"], [(16777216 + 3) / 4])
