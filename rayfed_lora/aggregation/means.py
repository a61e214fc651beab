"""The weighted means that rules aggregate from: running, in float64 and in client order.

Source: docs/method.md, "Randomness".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Literal

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.updates import ClientUpdates, EachUpdate
from rayfed_lora.lora.products import WeightedProduct, norm
from rayfed_lora.lora.stacked import StackedStates, named
from rayfed_lora.types import AdapterState, Factors, FloatArray

Kept = Literal["factors", "padded", "updates"]
Float64Array = npt.NDArray[np.float64]
# (b, a), (d_out, R) and (R, d_in), scales in b.
Product = tuple[Float64Array, Float64Array]
# Values; 512 kB in float64.
_PART = 1 << 16


class Means:
    """Weighted means over clients; picklable, of a size that does not grow with their number.

    A block of clients is reduced where it was trained; the means are joined in block order. They
    always hold the dense tensors and the exact mean update of each module; a rule asks for more:
    `factors`, the means of A and of B; `padded`, the sums of HetLoRA; `updates`, every client's
    tensors, whose size does grow with the number of clients.
    """

    def __init__(self, kept: frozenset[Kept] = frozenset()) -> None:
        self._kept = kept
        self._tensors = TensorMean()
        self._products: dict[str, ProductMean] = {}
        self._padded = PaddedMean()
        self._updates = EachUpdate()

    def add(self, weight: float, state: AdapterState, client: int = -1) -> None:
        """Add one client's trained state with its weight, > 0 (any unit, e.g. examples)."""
        if "updates" in self._kept:
            tensors = named(state)
            flat = [tensor.ravel() for tensor in tensors.values()]
            row = np.concatenate(flat) if flat else np.zeros(0, np.float32)
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            self._updates.add([client], np.array([weight]), row[None], shapes)
        self._tensors.add(weight, named(state) if "factors" in self._kept else state.dense)
        for name, sent in state.factors.items():
            self._products.setdefault(name, ProductMean()).add(weight, sent)
        if "padded" in self._kept:
            self._padded.add(state.factors)

    def add_all(
        self,
        weights: Sequence[float],
        states: Sequence[AdapterState],
        clients: Sequence[int] | None = None,
    ) -> None:
        """Add several clients in order, at once where they were trained together.

        Sums of tensors are the same bit for bit; exact updates are summed by a matrix product,
        whose order of summation may differ.
        """
        ids = [-1] * len(weights) if clients is None else clients
        if not (isinstance(states, StackedStates) and len(states) > 1 and states.alike):
            for weight, state, client in zip(weights, states, ids, strict=True):
                self.add(weight, state, client)
            return
        each = np.array(weights)
        if "updates" in self._kept:
            self._updates.add(ids, each, *states.values(dense=False))
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
        self._updates.join(other._updates)

    def pack(self) -> None:
        """Reduce the number of arrays held, before they are sent."""
        for mean in self._products.values():
            mean.pack()

    def tensors(self) -> dict[str, Float64Array]:
        """Return the means of the dense tensors and, where kept, of A and B, by `step.named`."""
        return self._tensors.mean()

    def with_tensors(self, tensors: Mapping[str, Float64Array]) -> Means:
        """Return the same means but for those of tensors, which are replaced by others."""
        found = copy(self)
        found._tensors = TensorMean.of(tensors)
        return found

    def updates(self) -> ClientUpdates:
        """Return every client's tensors, where kept."""
        return self._updates.all()

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


class TensorMean:
    """The weighted mean of equally named tensors.

    Holds the first client's tensors unchanged, and from the second client on one float64 sum.
    """

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._first: tuple[float, FloatArray] | None = None
        self._sum: Float64Array | None = None
        self._weight = 0.0

    @classmethod
    def of(cls, tensors: Mapping[str, Float64Array]) -> TensorMean:
        """Return a mean of these values, exactly."""
        made = cls()
        made._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = [tensor.ravel() for tensor in tensors.values()]
        made._sum, made._weight = np.concatenate([np.zeros(0), *flat]), 1.0
        return made

    def add(self, weight: float, tensors: Mapping[str, FloatArray]) -> None:
        """Add one client's tensors with its weight, > 0 (any unit, e.g. examples).

        Raises:
            ValueError: names or shapes differ from those of the first client.
        """
        flat = [tensor.ravel() for tensor in tensors.values()]
        row = np.concatenate(flat) if flat else np.zeros(0, np.float32)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.add_rows(np.array([weight]), row[None], shapes)

    def add_rows(
        self, weights: Float64Array, rows: FloatArray, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Add several clients in order; raises as `add` does.

        Args:
            weights: (clients,), each > 0.
            rows: (clients, values), a client's tensors side by side, in the order of `shapes`.
            shapes: of the tensors, by name.
        """
        self._check(shapes)
        self._add(weights, rows)

    def join(self, other: TensorMean) -> None:
        """Add the clients of another mean; raises as `add` does."""
        if other._weight > 0.0:
            self._check(other._shapes)
        if other._first is not None:
            weight, flat = other._first
            self._add(np.array([weight]), flat[None])
        if other._sum is not None:
            own = self._summed()
            # The other sum may be read-only, e.g. from Ray's object store.
            self._sum = other._sum.copy() if own is None else np.add(own, other._sum, out=own)
            self._weight += other._weight

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        expected = self._shapes = self._shapes if self._weight > 0.0 else shapes
        if shapes != expected:
            wrong = next(n for n in {**expected, **shapes} if expected.get(n) != shapes.get(n))
            raise ValueError(
                f"{wrong}: expected shape {expected.get(wrong)} as of the first client, got"
                f" {shapes.get(wrong)}"
            )

    def _add(self, weights: Float64Array, rows: FloatArray) -> None:
        own = self._summed()
        self._weight += sum(weights.tolist())
        if own is None and len(rows) == 1:
            self._first = float(weights[0]), rows[0]
            return
        total = self._sum = np.empty(rows.shape[1]) if own is None else own
        # In parts that fit a processor's cache: all products together are as large as the clients.
        step = max(_PART // len(rows), 2)
        for i in range(0, len(total), step):
            products = np.multiply(rows[:, i : i + step], weights[:, None], dtype=np.float64)
            if own is not None:
                products[0] += own[i : i + step]
            # Row by row: the same bits as one client at a time.
            np.add.reduce(products, axis=0, out=total[i : i + step])

    def _summed(self) -> Float64Array | None:
        """Return the sum, the first client included; None without clients."""
        if self._first is not None:
            weight, flat = self._first
            self._sum, self._first = np.multiply(flat, weight, dtype=np.float64), None
        return self._sum

    def mean(self) -> dict[str, Float64Array]:
        """Return sum of weight * tensor / sum of weight, by name."""
        if self._first is not None:
            flat = self._first[1].astype(np.float64)
        else:
            flat = np.zeros(0) if self._sum is None else self._sum / self._weight
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}


class ProductMean:
    """The weighted mean of one module's effective updates, exactly.

    Holds the clients' factors while these are smaller than two d_out x d_in matrices, and one such
    matrix from then on: memory is bounded, whatever the number of clients.
    """

    def __init__(self) -> None:
        # Weighted factors in order of arrival; `_rank` is the sum of their ranks.
        self._terms: list[tuple[float, Factors] | WeightedProduct] = []
        self._rank = 0
        self._dense: Float64Array | None = None
        self._weight = 0.0

    def add(self, weight: float, factors: Factors) -> None:
        """Add one client's factors with its weight, > 0; ranks and scales may differ."""
        self._weight += weight
        self._take((weight, factors))

    def add_total(self, weight: float, total: WeightedProduct) -> None:
        """Add several clients at once: the sums of their weights and of their weighted updates."""
        self._weight += weight
        self._take(total)

    def join(self, other: ProductMean) -> None:
        """Add the clients of another mean."""
        self._weight += other._weight
        if other._dense is not None:
            self._dense = other._dense if self._dense is None else self._dense + other._dense
        for term in other._terms:
            self._take(term)

    def _take(self, term: tuple[float, Factors] | WeightedProduct) -> None:
        product = term if isinstance(term, WeightedProduct) else term[1]
        # One product of rank 0 is kept, for its shape.
        if product.rank == 0 and (self._terms or self._dense is not None):
            return
        self._terms.append(term)
        self._rank += product.rank
        d_out, d_in = product.b.shape[0], product.a.shape[1]
        if self._rank * (d_out + d_in) > 2 * d_out * d_in:
            self._dense, self._terms, self._rank = self._matrix(), [], 0

    def _sum(self) -> WeightedProduct:
        terms = self._terms
        return WeightedProduct.sum(
            [t if isinstance(t, WeightedProduct) else WeightedProduct.of(*t) for t in terms]
        )

    def _matrix(self) -> Float64Array:
        b, a = self._sum().weighted()
        matrix: Float64Array = b @ a
        return matrix if self._dense is None else self._dense + matrix

    def pack(self) -> None:
        """Reduce the number of arrays held, each of which costs time when it is sent."""
        if self._dense is None:
            self._terms = [self._sum()] if self._terms else []
        elif self._terms:
            self._dense, self._terms, self._rank = self._matrix(), [], 0

    def mean(self) -> Product:
        """Return (b, a), (d_out, R) and (R, d_in), whose product is the mean update."""
        if self._dense is None:
            b, a = self._sum().weighted()
            return b / self._weight, a
        matrix = self._matrix() if self._terms else self._dense
        return matrix / self._weight, np.eye(matrix.shape[1])
