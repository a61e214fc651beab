"""The weighted means that rules aggregate from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from rayfed_lora.aggregation.mean import Float64Array, Product, ProductMean, TensorMean
from rayfed_lora.lora.products import norm
from rayfed_lora.lora.stacked import StackedStates, named
from rayfed_lora.types import AdapterState, Factors

Kept = Literal["factors", "padded"]


class Means:
    """Weighted means over clients; picklable, of a size that does not grow with their number.

    A block of clients is reduced where it was trained; the means are joined in block order. They
    always hold the dense tensors and the exact mean update of each module; a rule asks for more:
    `factors`, the means of A and of B; `padded`, the sums of HetLoRA.
    """

    def __init__(self, kept: frozenset[Kept] = frozenset()) -> None:
        self._kept = kept
        self._tensors = TensorMean()
        self._products: dict[str, ProductMean] = {}
        self._padded = PaddedMean()

    def add(self, weight: float, state: AdapterState) -> None:
        """Add one client's trained state with its weight, > 0 (any unit, e.g. examples)."""
        self._tensors.add(weight, named(state) if "factors" in self._kept else state.dense)
        for name, sent in state.factors.items():
            self._products.setdefault(name, ProductMean()).add(weight, sent)
        if "padded" in self._kept:
            self._padded.add(state.factors)

    def add_all(self, weights: Sequence[float], states: Sequence[AdapterState]) -> None:
        """Add several clients in order, at once where they were trained together.

        Sums of tensors are the same bit for bit; exact updates are summed by a matrix product,
        whose order of summation may differ.
        """
        if not (isinstance(states, StackedStates) and len(states) > 1 and states.alike):
            for weight, state in zip(weights, states, strict=True):
                self.add(weight, state)
            return
        each = np.array(weights)
        rows, shapes = states.values(dense="factors" not in self._kept)
        self._tensors.add_rows(each, rows, shapes)
        for name, total in states.products(each).items():
            self._products.setdefault(name, ProductMean()).add_total(float(each.sum()), total)
        if "padded" in self._kept:
            for state in states:
                self._padded.add(state.factors)

    def join(self, other: Means) -> None:
        """Add the clients of other means of the same rule, after those held so far."""
        self._tensors.join(other._tensors)
        for name, mean in other._products.items():
            self._products.setdefault(name, ProductMean()).join(mean)
        self._padded.join(other._padded)

    def pack(self) -> None:
        """Reduce the number of arrays held, before they are sent."""
        for mean in self._products.values():
            mean.pack()

    def tensors(self) -> dict[str, Float64Array]:
        """Return the means of the dense tensors and, where kept, of A and B, by `step.named`."""
        return self._tensors.mean()

    def product(self, module: str) -> Product:
        """Return the exact mean of a module's updates."""
        return self._products[module].mean()

    def padded(self, module: str) -> Product | None:
        """Return the means of padded B and A, weighted by update size; None where all are 0."""
        return self._padded.mean(module)


class PaddedMean:
    """The means of factors padded with zeros to the largest rank, weighted by update size."""

    def __init__(self) -> None:
        self._sums: dict[str, Product] = {}
        self._weight = 0.0

    def add(self, factors: Mapping[str, Factors]) -> None:
        """Add one client."""
        weight = math.hypot(*(f.scale * norm(f.b, f.a) for f in factors.values()))
        if weight > 0.0:
            sums = {
                name: (weight * f.b.astype(np.float64), weight * f.a.astype(np.float64))
                for name, f in factors.items()
            }
            self._take(weight, sums)

    def join(self, other: PaddedMean) -> None:
        """Add the clients of another mean."""
        self._take(other._weight, other._sums)

    def _take(self, weight: float, sums: Mapping[str, Product]) -> None:
        self._weight += weight
        for name, (b, a) in sums.items():
            own = self._sums.get(name)
            self._sums[name] = (b, a) if own is None else _padded_sum(own, (b, a))

    def mean(self, module: str) -> Product | None:
        """Return (b, a) of a module; None where no client has an update."""
        if self._weight == 0.0:
            return None
        b, a = self._sums[module]
        return b / self._weight, a / self._weight


def _padded_sum(one: Product, other: Product) -> Product:
    """Return the sums of two b and of two a, of different ranks."""
    (b, a), (small_b, small_a) = sorted((one, other), key=lambda p: p[1].shape[0], reverse=True)
    b, a, rank = b.copy(), a.copy(), small_a.shape[0]
    b[:, :rank] += small_b
    a[:rank] += small_a
    return b, a
