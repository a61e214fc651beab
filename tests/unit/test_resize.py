"""Rank changes: small matrices by hand, and the cases at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayfed_lora.lora import resize
from rayfed_lora.lora.products import ProductSvd
from rayfed_lora.lora.states import dense_params, factor_params
from rayfed_lora.types import AdapterState, Factors


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_factors(d_out: int, rank: int, d_in: int, scale: float = 2.0) -> Factors:
    draw = rng(17)
    a = draw.normal(size=(rank, d_in)).astype(np.float32)
    b = draw.normal(size=(d_out, rank)).astype(np.float32)
    return Factors(a, b, scale)


def dense(factors: Factors) -> np.ndarray:
    return factors.scale * (factors.b.astype(np.float64) @ factors.a.astype(np.float64))


def diagonal() -> Factors:
    """D = diag(8, 2, 0.5), at scale 2: B = diag(4, 1, 0.25), A = I."""
    b = np.diag([4.0, 1.0, 0.25]).astype(np.float32)
    return Factors(np.eye(3, dtype=np.float32), b, 2.0)


def test_a_shrunk_diagonal_keeps_its_largest_entries_and_splits_them_as_square_roots():
    got = resize.resize(diagonal(), 2, 2.0, rng())
    # 8 / 2 = 4 and 2 / 2 = 1, so A and B hold 2 and 1 each
    np.testing.assert_allclose(got.b, [[2, 0], [0, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(got.a, [[2, 0, 0], [0, 1, 0]], atol=1e-6)
    assert got.scale == 2.0


def test_a_shrink_divides_a_new_scale_out():
    got = resize.resize(diagonal(), 1, 0.5, rng())
    # 8 / 0.5 = 16 = 4 * 4
    np.testing.assert_allclose(got.b, [[4], [0], [0]], atol=1e-6)
    np.testing.assert_allclose(got.a, [[4, 0, 0]], atol=1e-6)
    assert got.scale == 0.5


def test_the_largest_entry_of_each_left_vector_is_positive():
    factors = Factors(np.eye(2, dtype=np.float32), -np.diag([3.0, 1.0]).astype(np.float32), 1.0)
    got = resize.truncate(factors, 1, 1.0)
    root = math.sqrt(3)
    np.testing.assert_allclose(got.b, [[root], [0]], atol=1e-6)
    np.testing.assert_allclose(got.a, [[-root, 0]], atol=1e-6)


def test_what_a_shrink_cuts_off_is_the_rest_of_the_diagonal_at_scale_one():
    rest = resize.cut_off(diagonal(), 1)
    assert (rest.rank, rest.scale) == (2, 1.0)
    np.testing.assert_allclose(dense(rest), np.diag([0, 2, 0.5]), atol=1e-6)


def test_nothing_is_cut_off_at_the_full_rank():
    rest = resize.cut_off(diagonal(), 3)
    assert (rest.a.shape, rest.b.shape) == ((0, 3), (3, 0))


def test_growing_keeps_the_old_rows_and_adds_zero_columns_to_b():
    old = random_factors(4, 2, 6)
    got = resize.resize(old, 5, old.scale, rng())
    np.testing.assert_array_equal(got.a[:2], old.a)
    np.testing.assert_array_equal(got.b[:, :2], old.b)
    np.testing.assert_array_equal(got.b[:, 2:], np.zeros((4, 3)))
    assert np.all(np.any(got.a[2:] != 0, axis=1))


def test_growing_divides_a_new_scale_out_of_b():
    got = resize.resize(diagonal(), 4, 8.0, rng())
    # 2 / 8 = 1/4 of diag(4, 1, 0.25)
    np.testing.assert_array_equal(got.b[:, :3], np.diag([1.0, 0.25, 0.0625]))
    assert got.scale == 8.0


def test_the_same_rank_with_another_scale_rescales_b_only():
    old = diagonal()
    got = resize.resize(old, 3, 4.0, rng())
    np.testing.assert_array_equal(got.a, old.a)
    np.testing.assert_array_equal(got.b, np.diag([2.0, 0.5, 0.125]))
    assert got.scale == 4.0


def test_the_same_rank_and_scale_give_the_very_same_object():
    old = random_factors(4, 2, 6)
    assert resize.resize(old, 2, old.scale, rng()) is old


def test_new_rows_come_from_the_stream_alone():
    old = random_factors(4, 2, 6)
    first, again, other = (resize.resize(old, 4, 2.0, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.a, again.a)
    assert np.all(np.any(first.a[2:] != other.a[2:], axis=1))


def test_new_rows_have_the_usual_initial_size():
    # Kaiming uniform with a = sqrt(5): bound sqrt(6 / ((1 + 5) d_in)) = 1 / sqrt(d_in) = 0.1,
    # variance bound^2 / 3
    rows = resize.initial_rows(200, 100, rng())
    assert rows.shape == (200, 100)
    assert rows.dtype == np.float32
    assert float(np.abs(rows).max()) <= 0.1
    assert float(rows.var()) == pytest.approx(0.01 / 3, rel=0.05)
    assert float(rows.mean()) == pytest.approx(0, abs=0.002)


def test_a_shrink_to_rank_zero_leaves_empty_factors_of_the_right_sizes():
    got = resize.resize(random_factors(4, 2, 6), 0, 3.0, rng())
    assert (got.a.shape, got.b.shape, got.scale) == ((0, 6), (4, 0), 3.0)


def test_a_module_can_come_back_from_rank_zero():
    empty = resize.resize(random_factors(4, 2, 6), 0, 2.0, rng())
    got = resize.resize(empty, 3, 2.0, rng())
    assert (got.a.shape, got.b.shape) == ((3, 6), (4, 3))
    assert np.all(np.any(got.a != 0, axis=1))
    np.testing.assert_array_equal(got.b, np.zeros((4, 3)))


def test_rank_zero_stays_rank_zero_under_another_scale():
    empty = resize.resize(random_factors(4, 2, 6), 0, 2.0, rng())
    got = resize.resize(empty, 0, 5.0, rng())
    assert (got.a.shape, got.b.shape, got.scale) == ((0, 6), (4, 0), 5.0)


def test_a_shrink_may_end_above_the_rank_that_the_matrix_can_have():
    old = random_factors(3, 9, 5)
    got = resize.resize(old, 7, old.scale, rng())
    assert (got.a.shape, got.b.shape) == ((7, 5), (3, 7))
    np.testing.assert_allclose(dense(got), dense(old), atol=1e-5)
    np.testing.assert_array_equal(got.b[:, 3:], np.zeros((3, 4)))
    assert np.all(np.any(got.a != 0, axis=1))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_fresh_adapter_can_still_be_trained_after_a_shrink(rank):
    fresh = Factors(resize.initial_rows(8, 6, rng()), np.zeros((4, 8), np.float32), 2.0)
    got = resize.resize(fresh, rank, 2.0, rng())
    np.testing.assert_array_equal(got.b, np.zeros((4, rank)))
    # a row of A has d_in values of variance 1 / (3 d_in): its norm is about sqrt(1/3)
    np.testing.assert_allclose(np.linalg.norm(got.a, axis=1), math.sqrt(1 / 3), rtol=1e-6)
    # the rows still lie in the span of the old ones
    old_rows = fresh.a.astype(np.float64)
    weights = np.linalg.lstsq(old_rows.T, got.a.T.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(weights.T @ old_rows, got.a, atol=1e-5)


def test_a_direction_without_energy_stays_trainable_beside_one_that_has_some():
    # D = diag(4, 0): the second direction has nothing to lose, and must have a row of A
    b = np.diag([4.0, 0.0, 0.0]).astype(np.float32)
    got = resize.resize(Factors(np.eye(3, dtype=np.float32), b, 1.0), 2, 1.0, rng())
    np.testing.assert_allclose(np.linalg.norm(got.a, axis=1), [2, math.sqrt(1 / 3)], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got.b, axis=0), [2, 0], atol=1e-6)


def test_the_factors_of_an_svd_keep_no_more_directions_than_there_are():
    svd = ProductSvd(np.eye(3)[:, :2], np.array([4.0, 1.0]), np.eye(5)[:2])
    got = resize.from_svd(svd, 4, 1.0)
    assert got.rank == 2
    np.testing.assert_allclose(dense(got), np.diag([4.0, 1.0, 0.0]) @ np.eye(3, 5), atol=1e-6)


@pytest.mark.parametrize(
    ("rank", "scale"), [(-1, 1.0), (2, 0.0), (2, -1.0), (2, math.nan)], ids=str
)
def test_a_negative_rank_or_a_scale_that_is_not_positive_is_refused(rank, scale):
    with pytest.raises(ValueError, match=f"got {rank} and {scale}"):
        resize.resize(random_factors(4, 2, 6), rank, scale, rng())


@pytest.mark.parametrize(
    ("scaling", "rank", "scale"),
    [
        ("constant", 16, 1.0),  # 16 / 16
        ("constant", 4, 1.0),
        ("alpha_over_rank", 4, 4.0),  # 16 / 4
        ("rslora", 4, 8.0),  # 16 / 2
        ("constant", 0, 1.0),
        ("alpha_over_rank", 0, 16.0),
        ("rslora", 0, 16.0),
    ],
)
def test_the_scale_of_each_mode(scaling, rank, scale):
    assert resize.module_scale(scaling, 16.0, 16, rank) == scale


def test_a_constant_scale_is_defined_where_the_heating_rank_is_zero():
    assert resize.module_scale("constant", 16.0, 0, 0) == 16.0


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="'alpha'"):
        resize.module_scale("alpha", 16.0, 16, 4)


def test_the_values_of_a_state_are_counted_apart_for_factors_and_dense_tensors():
    head = {"head.weight": np.zeros((3, 6), np.float32), "head.bias": np.zeros(3, np.float32)}
    state = AdapterState({"q": random_factors(4, 2, 6), "v": random_factors(5, 0, 6)}, head)
    assert factor_params(state) == 2 * 6 + 4 * 2
    assert dense_params(state) == 3 * 6 + 3
