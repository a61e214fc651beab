"""Changes of an adapter's rank that keep its effective update, or change it least.

Source: docs/method.md, "Resizing the rank"; Eckart and Young 1936, Psychometrika 1:211.
"""

from __future__ import annotations

import math

import numpy as np

from rayfed_lora.lora.products import ProductSvd, update_svd
from rayfed_lora.types import Factors, FloatArray

# Directions with less than this share of the largest singular value are float32 rounding noise.
_NEGLIGIBLE = float(np.finfo(np.float32).eps)


def module_scale(scaling: str, alpha: float, heating_rank: int, rank: int) -> float:
    """Return s for a module of the given rank.

    `constant`: alpha / heating_rank | `alpha_over_rank`: alpha / rank (arXiv:2106.09685) |
    `rslora`: alpha / sqrt(rank) (arXiv:2312.03732). Ranks below 1 count as 1.

    Raises:
        ValueError: an unknown scaling.

    >>> module_scale("constant", 16, 8, 2), module_scale("alpha_over_rank", 16, 8, 2)
    (2.0, 8.0)
    """
    heating_rank, rank = max(heating_rank, 1), max(rank, 1)
    divisors = {"constant": heating_rank, "alpha_over_rank": rank, "rslora": math.sqrt(rank)}
    if scaling not in divisors:
        raise ValueError(f"need scaling {', '.join(divisors)}, got {scaling!r}")
    return alpha / divisors[scaling]


def initial_rows(rank: int, d_in: int, rng: np.random.Generator) -> FloatArray:
    """Return new rows of A, (rank, d_in), uniform in +-1 / sqrt(d_in).

    The distribution is PEFT's default (Kaiming uniform with a = sqrt(5)).
    """
    bound = 1.0 / math.sqrt(d_in)
    return rng.uniform(-bound, bound, (rank, d_in)).astype(np.float32)


def from_svd(svd: ProductSvd, rank: int, scale: float) -> Factors:
    """Return the best approximation of u s vt with at most `rank`, split as sqrt(s).

    A direction without energy gets a zero column of B and a row of A of initial size: the update is
    the same, and the direction can still be trained (two zero factors could not).

    min(rank, k) directions of `svd`, that of an effective update D, are kept; rank >= 0, and the
    scale of the new factors is > 0.
    """
    u, s, vt = svd.u[:, :rank], svd.s[:rank] / scale, svd.vt[:rank]
    root = np.sqrt(s)
    largest = float(svd.s.max(initial=0.0))
    dead = svd.s[:rank] <= _NEGLIGIBLE * largest
    a_size, b_size = np.where(dead, 1.0 / math.sqrt(3.0), root), np.where(dead, 0.0, root)
    a, b = vt * a_size[:, None], u * b_size
    return Factors(a.astype(np.float32), b.astype(np.float32), scale)


def truncate(factors: Factors, rank: int, scale: float) -> Factors:
    """Return the best approximation of D at a lower or equal rank, >= 0.

    The new s, `scale` > 0, is divided out, so that D does not depend on it.
    """
    if rank == 0:
        d_out, d_in = factors.b.shape[0], factors.a.shape[1]
        empty_a, empty_b = np.zeros((0, d_in), np.float32), np.zeros((d_out, 0), np.float32)
        return Factors(empty_a, empty_b, scale)
    return from_svd(update_svd(factors), rank, scale)


def cut_off(factors: Factors, rank: int) -> Factors:
    """Return the part that `truncate` drops: D minus its best approximation, at scale 1.

    The result has rank k - min(rank, k), k = min(r, d_in, d_out).
    """
    svd = update_svd(factors)
    rest = ProductSvd(svd.u[:, rank:], svd.s[rank:], svd.vt[rank:])
    return from_svd(rest, svd.s.size, 1.0)


def pad(factors: Factors, rank: int) -> Factors:
    """Return the same D at a higher or equal rank, with zero rows of A and zero columns of B."""
    more = rank - factors.rank
    if more == 0:
        return factors
    a, b = np.pad(factors.a, ((0, more), (0, 0))), np.pad(factors.b, ((0, 0), (0, more)))
    return Factors(a, b, factors.scale)


def grow(factors: Factors, rank: int, scale: float, rng: np.random.Generator) -> Factors:
    """Return factors of a higher rank with the same D: new rows of A drawn, new columns of B zero.

    The new s, `scale` > 0, is divided out of B. Ranks above min(d_in, d_out) are legal.
    """
    extra = rank - factors.rank
    rows = initial_rows(extra, factors.a.shape[1], rng)
    columns = np.zeros((factors.b.shape[0], extra), np.float32)
    b = factors.b
    if scale != factors.scale:
        b = (b.astype(np.float64) * (factors.scale / scale)).astype(np.float32)
    return Factors(np.concatenate([factors.a, rows]), np.concatenate([b, columns], axis=1), scale)


def resize(factors: Factors, rank: int, scale: float, rng: np.random.Generator) -> Factors:
    """Return factors of exactly the given rank and scale.

    Down: Eckart-Young truncation of D. Up: D unchanged, new rows of A drawn from `rng`. Same rank:
    D unchanged, B rescaled where the scale changes; the same object where neither changes. Ranks
    above min(d_in, d_out) are legal.

    Raises:
        ValueError: `rank` is negative or `scale` is not positive.
    """
    if rank < 0 or not scale > 0:
        raise ValueError(f"need rank >= 0 and scale > 0, got {rank} and {scale}")
    if rank < factors.rank:
        cut = truncate(factors, rank, scale)
        # D has at most min(d_in, d_out) directions; `grow` fills up a higher rank.
        return cut if cut.rank == rank else grow(cut, rank, scale, rng)
    if rank == factors.rank and scale == factors.scale:
        return factors
    return grow(factors, rank, scale, rng)
