"""Rank changes of any factors, against numpy's SVD of the dense update."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rayfed_lora.lora import resize
from rayfed_lora.types import Factors

cheap = settings(max_examples=60, deadline=None)
SIZE = st.integers(1, 7)
RANK = st.integers(0, 9)
SCALE = st.sampled_from([0.125, 0.5, 1.0, 2.0, 16.0])
SCALING = ["constant", "alpha_over_rank", "rslora"]
ALPHA, HEATING_RANK = 16.0, 8


@st.composite
def factors(draw, rank=RANK) -> Factors:
    d_out, d_in, r = draw(SIZE), draw(SIZE), draw(rank)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a = rng.normal(size=(r, d_in)).astype(np.float32)
    b = rng.normal(size=(d_out, r)).astype(np.float32)
    if draw(st.booleans()):  # some directions repeated, so that D has less than its full rank
        keep = rng.integers(0, 2, r)
        b *= keep.astype(np.float32)
    return Factors(a, b, draw(SCALE))


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))


def size(f: Factors) -> float:
    """|s| |B| |A|: what float32 rounding of the factors is relative to."""
    return f.scale * float(np.linalg.norm(f.b)) * float(np.linalg.norm(f.a)) + 1e-30


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@cheap
@given(old=factors(), rank=RANK, scale=SCALE)
def test_a_shrink_is_the_nearest_matrix_of_its_rank(old, rank, scale):
    assume(rank < old.rank)
    got = resize.resize(old, rank, scale, rng())
    full = dense(old)
    u, s, vt = np.linalg.svd(full, full_matrices=False)
    best = u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]
    # Eckart and Young: the distance is the root of the squares of what is cut off ...
    distance = np.linalg.norm(full - dense(got))
    assert distance == pytest.approx(np.sqrt(np.sum(s[rank:] ** 2)), abs=2e-6 * size(old))
    # ... and the matrix itself is determined where the spectrum has a gap at the cut
    if rank < s.size and (rank == 0 or s[rank - 1] - s[rank] > 0.05 * s[0]):
        np.testing.assert_allclose(dense(got), best, atol=1e-5 * size(old))
    assert np.linalg.matrix_rank(dense(got), tol=1e-5 * size(old)) <= rank


@pytest.mark.parametrize("scaling", SCALING)
@cheap
@given(old=factors(), rank=RANK)
def test_growing_and_keeping_the_rank_do_not_change_the_update_in_any_scaling(scaling, old, rank):
    assume(rank >= old.rank)
    old = Factors(old.a, old.b, resize.module_scale(scaling, ALPHA, HEATING_RANK, old.rank))
    scale = resize.module_scale(scaling, ALPHA, HEATING_RANK, rank)
    got = resize.resize(old, rank, scale, rng())
    assert got.scale == scale
    np.testing.assert_allclose(dense(got), dense(old), atol=1e-6 * size(old))


@pytest.mark.parametrize("scaling", SCALING)
@cheap
@given(old=factors(rank=st.integers(3, 9)), rank=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_shrink_that_cuts_nothing_off_does_not_change_the_update_in_any_scaling(
    scaling, old, rank, seed
):
    # D of rank <= `rank`, written with more columns than it needs
    mix = np.random.default_rng(seed).normal(size=(rank, old.rank)).astype(np.float32)
    scale = resize.module_scale(scaling, ALPHA, HEATING_RANK, old.rank)
    thick = Factors(old.a, old.b[:, :rank] @ mix, scale)
    new_scale = resize.module_scale(scaling, ALPHA, HEATING_RANK, rank)
    got = resize.resize(thick, rank, new_scale, rng())
    assert got.scale == new_scale
    np.testing.assert_allclose(dense(got), dense(thick), atol=2e-6 * size(thick))


@cheap
@given(old=factors(), rank=RANK, scale=SCALE)
def test_what_is_kept_and_what_is_cut_off_sum_to_the_whole(old, rank, scale):
    assume(rank <= old.rank)
    kept, rest = resize.truncate(old, rank, scale), resize.cut_off(old, rank)
    np.testing.assert_allclose(dense(kept) + dense(rest), dense(old), atol=2e-6 * size(old))
    possible = min(old.rank, old.a.shape[1], old.b.shape[0])
    assert rest.rank == possible - min(rank, possible)
    assert rest.scale == 1.0
    # they share no direction
    np.testing.assert_allclose(dense(kept).T @ dense(rest), 0, atol=1e-5 * size(old) ** 2)


@cheap
@given(old=factors(), rank=RANK, scale=SCALE)
def test_every_resize_has_the_sizes_asked_for_and_rows_that_can_be_trained(old, rank, scale):
    before = old.a.copy(), old.b.copy()
    got = resize.resize(old, rank, scale, rng())
    assert got.a.shape == (rank, old.a.shape[1])
    assert got.b.shape == (old.b.shape[0], rank)
    assert (got.a.dtype, got.b.dtype, got.scale) == (np.float32, np.float32, scale)
    assert np.all(np.linalg.norm(got.a, axis=1) > 0)
    np.testing.assert_array_equal(old.a, before[0])
    np.testing.assert_array_equal(old.b, before[1])


@cheap
@given(old=factors(), rank=RANK, scale=SCALE)
def test_a_shrink_splits_evenly_with_the_largest_entry_of_each_column_of_b_positive(
    old, rank, scale
):
    assume(rank < old.rank)
    got = resize.truncate(old, rank, scale)
    b_norms, a_norms = np.linalg.norm(got.b, axis=0), np.linalg.norm(got.a, axis=1)
    live = b_norms > 0
    np.testing.assert_allclose(b_norms[live], a_norms[live], rtol=1e-5)
    columns = got.b[:, live]
    largest = columns[np.argmax(np.abs(columns), axis=0), np.arange(columns.shape[1])]
    assert np.all(largest > 0)


@cheap
@given(old=factors(), rank=RANK, scale=SCALE)
def test_the_same_resize_gives_the_same_bits(old, rank, scale):
    first, again = (resize.resize(old, rank, scale, rng()) for _ in range(2))
    assert first.a.tobytes() == again.a.tobytes()
    assert first.b.tobytes() == again.b.tobytes()


@cheap
@given(old=factors())
def test_nothing_to_change_gives_the_very_same_object(old):
    assert resize.resize(old, old.rank, old.scale, rng()) is old
