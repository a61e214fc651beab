"""Weighted means over a stream of client states, in float64, in the order they come.

Source: this project (method.md, "Randomness": reductions in client order, float64 accumulators).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from rayfed_lora.lora.products import product_svd, stacked
from rayfed_lora.types import Factors, FloatArray

Float64Array = npt.NDArray[np.float64]


class TensorMean:
    """The weighted mean of equally named tensors; holds one float64 copy of them."""

    def __init__(self) -> None:
        self._sums: dict[str, Float64Array] = {}
        self._weight = 0.0

    def add(self, weight: float, tensors: Mapping[str, FloatArray]) -> None:
        """Add one client's tensors with its weight, > 0 (any unit, e.g. examples).

        Raises:
            ValueError: their names or shapes are not those of the first client.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if self._weight == 0.0:
            self._sums = {name: np.zeros(shape, np.float64) for name, shape in shapes.items()}
        expected = {name: total.shape for name, total in self._sums.items()}
        if shapes != expected:
            wrong = next(n for n in {**expected, **shapes} if expected.get(n) != shapes.get(n))
            raise ValueError(
                f"{wrong}: expected shape {expected.get(wrong)} as of the first client, got"
                f" {shapes.get(wrong)}"
            )
        self._weight += weight
        for name, tensor in tensors.items():
            self._sums[name] += tensor.astype(np.float64) * weight

    def mean(self) -> dict[str, Float64Array]:
        """Return sum of weight * tensor / sum of weight, by name."""
        return {name: total / self._weight for name, total in self._sums.items()}


class ProductMean:
    """The weighted mean of one module's effective updates, exactly, as stacked factors.

    Once the stack is wider than twice the module's largest possible rank it is rewritten, without
    loss, as its SVD: memory does not grow with the number of clients.
    """

    def __init__(self) -> None:
        self._b: list[Float64Array] = []
        self._a: list[Float64Array] = []
        self._weight = 0.0

    def add(self, weight: float, factors: Factors) -> None:
        """Add one client's factors with its weight, > 0; ranks and scales may differ."""
        self._weight += weight
        b, a = stacked([(weight, factors)])
        self._b.append(b)
        self._a.append(a)
        if sum(part.shape[0] for part in self._a) > 2 * min(b.shape[0], a.shape[1]):
            svd = product_svd(np.concatenate(self._b, axis=1), np.concatenate(self._a))
            self._b, self._a = [svd.u * svd.s], [svd.vt]

    def mean(self) -> tuple[Float64Array, Float64Array]:
        """Return (b, a), (d_out, R) and (R, d_in), whose product is the mean update."""
        return np.concatenate(self._b, axis=1) / self._weight, np.concatenate(self._a)
