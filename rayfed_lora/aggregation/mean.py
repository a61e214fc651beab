"""Weighted means of client states, in float64, in the order they come; any two can be joined.

Source: this project (method.md, "Randomness": reductions in client order, float64 accumulators).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.step import Float64Array, Product
from rayfed_lora.lora.products import stacked
from rayfed_lora.types import Factors, FloatArray


class TensorMean:
    """The weighted mean of equally named tensors.

    Holds a first client's tensors as they came, and one float64 sum from the second one on.
    """

    def __init__(self) -> None:
        self._first: tuple[float, Mapping[str, FloatArray]] | None = None
        self._sums: dict[str, Float64Array] | None = None
        self._weight = 0.0

    def add(self, weight: float, tensors: Mapping[str, FloatArray]) -> None:
        """Add one client's tensors with its weight, > 0 (any unit, e.g. examples).

        Raises:
            ValueError: their names or shapes are not those of the first client.
        """
        if self._first is None and self._sums is None:
            self._first = (weight, tensors)
            return
        self._take(weight, tensors, weight)

    def join(self, other: TensorMean) -> None:
        """Add what another mean has taken in; raises as `add` does."""
        if other._first is not None:
            self.add(*other._first)
        if other._sums is not None:
            self._take(other._weight, other._sums, 1.0)

    def _take(self, weight: float, tensors: Mapping[str, npt.NDArray[Any]], factor: float) -> None:
        """Add tensors times `factor` to the sums, which are new arrays: what came is not ours."""
        if self._sums is None:
            first = self._first[1] if self._first is not None else tensors
            self._sums = {name: np.zeros(tensor.shape) for name, tensor in first.items()}
        if self._first is not None:
            (first_weight, first), self._first = self._first, None
            self._take(first_weight, first, first_weight)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        expected = {name: total.shape for name, total in self._sums.items()}
        if shapes != expected:
            wrong = next(n for n in {**expected, **shapes} if expected.get(n) != shapes.get(n))
            raise ValueError(
                f"{wrong}: expected shape {expected.get(wrong)} as of the first client, got"
                f" {shapes.get(wrong)}"
            )
        self._weight += weight
        for name, tensor in tensors.items():
            self._sums[name] += tensor.astype(np.float64) * factor

    def mean(self) -> dict[str, Float64Array]:
        """Return sum of weight * tensor / sum of weight, by name."""
        if self._first is not None:
            return {name: tensor.astype(np.float64) for name, tensor in self._first[1].items()}
        return {name: total / self._weight for name, total in (self._sums or {}).items()}


class ProductMean:
    """The weighted mean of one module's effective updates, exactly.

    Held as stacked factors while these are smaller than the d_out x d_in matrix, and as that
    matrix from there on: memory does not grow with the number of clients.
    """

    def __init__(self) -> None:
        self._stack: list[Product] = []
        self._dense: Float64Array | None = None
        self._weight = 0.0

    def add(self, weight: float, factors: Factors) -> None:
        """Add one client's factors with its weight, > 0; ranks and scales may differ."""
        self._weight += weight
        self._stack.append(stacked([(weight, factors)]))
        self._shrink()

    def join(self, other: ProductMean) -> None:
        """Add what another mean has taken in."""
        self._weight += other._weight
        self._stack += other._stack
        if other._dense is not None:
            self._dense = other._dense if self._dense is None else self._dense + other._dense
        self._shrink()

    def _shrink(self) -> None:
        if not self._stack:
            return
        d_out, d_in = self._stack[0][0].shape[0], self._stack[0][1].shape[1]
        rank = sum(a.shape[0] for _, a in self._stack)
        if rank * (d_out + d_in) < d_out * d_in and self._dense is None:
            return
        b, a = _joined(self._stack)
        self._dense = b @ a if self._dense is None else self._dense + b @ a
        self._stack = []

    def mean(self) -> Product:
        """Return (b, a), (d_out, R) and (R, d_in), whose product is the mean update."""
        if self._dense is not None:
            return self._dense / self._weight, np.eye(self._dense.shape[1])
        b, a = _joined(self._stack)
        return b / self._weight, a


def _joined(stack: list[Product]) -> Product:
    return np.concatenate([b for b, _ in stack], axis=1), np.concatenate([a for _, a in stack])
