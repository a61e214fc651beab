"""The QR core against dense numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.lora import products
from rayfed_lora.lora.products import WeightedProduct
from rayfed_lora.types import Factors

cheap = settings(max_examples=80, deadline=None)
SIZE = st.integers(1, 7)
RANK = st.integers(0, 10)


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """b and a; sometimes with equal columns or with none but zeros."""
    d_out, rank, d_in = draw(SIZE), draw(RANK), draw(SIZE)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, a = rng.normal(size=(d_out, rank)), rng.normal(size=(rank, d_in))
    kind = draw(st.sampled_from(["full", "full", "deficient", "zero"]))
    if kind == "deficient" and rank > 1:
        b[:, 1:] = b[:, :1]
    if kind == "zero":
        b[:] = 0
    return b, a


def scale_of(b: np.ndarray, a: np.ndarray) -> float:
    return float(np.linalg.norm(b) * np.linalg.norm(a)) + 1e-30


@cheap
@given(pair=pairs())
def test_the_svd_of_a_product_is_the_svd_of_the_dense_matrix(pair):
    b, a = pair
    svd = products.product_svd(b, a)
    k = min(b.shape[1], b.shape[0], a.shape[1])
    assert (svd.u.shape, svd.s.shape, svd.vt.shape) == (
        (b.shape[0], k),
        (k,),
        (k, a.shape[1]),
    )
    dense = np.linalg.svd(b @ a, compute_uv=False)[:k]
    np.testing.assert_allclose(svd.s, dense, atol=1e-12 * scale_of(b, a))
    np.testing.assert_allclose((svd.u * svd.s) @ svd.vt, b @ a, atol=1e-12 * scale_of(b, a))


@cheap
@given(pair=pairs())
def test_the_vectors_are_orthonormal_and_the_values_fall(pair):
    svd = products.product_svd(*pair)
    identity = np.eye(svd.s.size)
    np.testing.assert_allclose(svd.u.T @ svd.u, identity, atol=1e-10)
    np.testing.assert_allclose(svd.vt @ svd.vt.T, identity, atol=1e-10)
    assert np.all(np.diff(svd.s) <= 0)
    assert np.all(svd.s >= 0)


@cheap
@given(pair=pairs())
def test_the_largest_entry_of_each_left_vector_is_positive(pair):
    for column in products.product_svd(*pair).u.T:
        assert column[np.argmax(np.abs(column))] > 0


@cheap
@given(pair=pairs())
def test_turning_the_sign_of_a_product_turns_the_right_vectors_only(pair):
    b, a = pair
    plus, minus = products.product_svd(b, a), products.product_svd(-b, a)
    np.testing.assert_array_equal(plus.s, minus.s)
    np.testing.assert_allclose(
        (plus.u * plus.s) @ plus.vt, -(minus.u * minus.s) @ minus.vt, atol=1e-12 * scale_of(b, a)
    )


def test_the_svd_of_single_precision_factors_is_computed_in_double():
    draw = np.random.default_rng(0)
    b, a = draw.normal(size=(6, 3)).astype(np.float32), draw.normal(size=(3, 5)).astype(np.float32)
    got = products.product_svd(b, a)
    exact = np.linalg.svd(b.astype(np.float64) @ a.astype(np.float64), compute_uv=False)[:3]
    np.testing.assert_allclose(got.s, exact, rtol=1e-13)


def test_inner_dimensions_that_differ_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 5\)"):
        products.product_svd(np.zeros((4, 2)), np.zeros((3, 5)))


@cheap
@given(pair=pairs())
def test_the_norm_is_the_frobenius_norm_of_the_dense_matrix(pair):
    b, a = pair
    got = products.norm(b, a)
    assert got == pytest.approx(np.linalg.norm(b @ a), rel=1e-9, abs=1e-7 * scale_of(b, a))


def test_the_norm_of_a_product_that_cancels_is_no_more_than_rounding():
    b, a = np.array([[1.0, -1.0]]), np.array([[0.1, 0.7], [0.1, 0.7]])
    assert products.norm(b, a) <= 1e-7


@st.composite
def terms(draw):
    d_out, d_in = draw(SIZE), draw(SIZE)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out = []
    for _ in range(draw(st.integers(1, 5))):
        rank = draw(RANK)
        a = rng.normal(size=(rank, d_in)).astype(np.float32)
        b = rng.normal(size=(d_out, rank)).astype(np.float32)
        scale = draw(st.sampled_from([0.25, 1.0, 3.0]))
        out.append((float(draw(st.integers(1, 50))), Factors(a, b, scale)))
    return out


@cheap
@given(weighted=terms())
def test_weighted_products_side_by_side_multiply_to_the_sum_of_the_updates(weighted):
    each = [WeightedProduct.of(w, f) for w, f in weighted]
    b, a = WeightedProduct.sum(each).weighted()
    dense = sum(
        w * f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64)) for w, f in weighted
    )
    ranks = sum(f.rank for _, f in weighted)
    assert (b.shape[1], a.shape[0]) == (ranks, ranks)
    assert (b.dtype, a.dtype) == (np.float64, np.float64)
    # far tighter than single precision
    np.testing.assert_allclose(b @ a, dense, atol=1e-13 * scale_of(b, a))


@cheap
@given(weighted=terms())
def test_the_spectrum_is_that_of_the_scaled_dense_update(weighted):
    _, f = weighted[0]
    k = min(f.rank, f.a.shape[1], f.b.shape[0])
    dense = f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))
    expected = np.linalg.svd(dense, compute_uv=False)[:k]
    tolerance = 1e-12 * f.scale * scale_of(f.b, f.a)
    np.testing.assert_allclose(products.spectrum(f), expected, atol=tolerance)
