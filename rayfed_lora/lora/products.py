"""Products of thin factors, never formed densely: the QR core.

For b (d_out x r) and a (r x d_in), with b = Qb Rb and a^T = Qa Ra, the singular values of b @ a are
those of the r x r core Rb Ra^T. Cost O((d_in + d_out) r^2). All arithmetic is float64.

Source: standard linear algebra (docs/method.md, "Resizing the rank").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora.types import Factors, FloatArray

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ProductSvd:
    """The thin SVD of a product b @ a, k = min(r, d_in, d_out).

    Attributes:
        u: (d_out, k), orthonormal columns; the largest-magnitude entry of each is positive.
        s: (k,), falling, >= 0.
        vt: (k, d_in), orthonormal rows.
    """

    u: Float64Array
    s: Float64Array
    vt: Float64Array


def product_svd(b: npt.ArrayLike, a: npt.ArrayLike) -> ProductSvd:
    """Return the SVD of b (d_out, r) @ a (r, d_in) through the QR core; r = 0 is legal.

    Raises:
        ValueError: the inner dimensions differ.
    """
    b64, a64 = np.asarray(b, np.float64), np.asarray(a, np.float64)
    if b64.shape[1] != a64.shape[0]:
        raise ValueError(f"need b (d_out, r) and a (r, d_in), got {b64.shape} and {a64.shape}")
    if a64.shape[0] == 0:
        return ProductSvd(b64, np.zeros(0), a64)
    qb, rb = np.linalg.qr(b64)
    qa, ra = np.linalg.qr(a64.T)
    core_u, s, core_vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    u, vt = qb @ core_u, core_vt @ qa.T
    largest = u[np.argmax(np.abs(u), axis=0), np.arange(u.shape[1])]
    signs = np.where(largest < 0, -1.0, 1.0)
    return ProductSvd(u * signs, s, vt * signs[:, None])


def norm(b: npt.ArrayLike, a: npt.ArrayLike) -> float:
    """Return the Frobenius norm of b @ a, as sqrt(tr((b^T b)(a a^T))).

    The trace cancels where b @ a nearly vanishes: the error is up to about 1e-8 of |b| |a|.
    """
    b64, a64 = np.asarray(b, np.float64), np.asarray(a, np.float64)
    return math.sqrt(max(float(np.sum((b64.T @ b64) * (a64 @ a64.T))), 0.0))


def update_svd(factors: Factors) -> ProductSvd:
    """Return the SVD of the effective update D = scale * b @ a."""
    svd = product_svd(factors.b, factors.a)
    return ProductSvd(svd.u, svd.s * factors.scale, svd.vt)


def spectrum(factors: Factors) -> Float64Array:
    """Return the singular values of the effective update D, falling, (k,)."""
    return update_svd(factors).s


@dataclass(frozen=True)
class WeightedProduct:
    """b @ diag(weights) @ a, with weights (r,), b (d_out, r) and a (r, d_in)."""

    weights: Float64Array
    b: FloatArray
    a: FloatArray

    @classmethod
    def of(cls, weight: float, factors: Factors) -> WeightedProduct:
        """Return weight * D of an effective update D."""
        return cls(np.full(factors.rank, weight * factors.scale), factors.b, factors.a)

    @classmethod
    def sum(cls, terms: Sequence[WeightedProduct]) -> WeightedProduct:
        """Return the sum of one or more products of one module, their columns side by side."""
        if len(terms) == 1:
            return terms[0]
        return cls(
            np.concatenate([term.weights for term in terms]),
            np.concatenate([term.b for term in terms], axis=1),
            np.concatenate([term.a for term in terms], axis=0),
        )

    @property
    def rank(self) -> int:
        """Number of columns and rows."""
        return len(self.weights)

    def weighted(self) -> tuple[Float64Array, Float64Array]:
        """Return (b, a) with the weights in b, exactly."""
        return self.b.astype(np.float64) * self.weights, np.asarray(self.a, np.float64)
