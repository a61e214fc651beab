"""FedIT: the means of A and of B apart. Source: arXiv:2305.05644."""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.mean import ProductMean, TensorMean
from rayfed_lora.aggregation.step import Aggregate, relative_error, stepped, stepped_tensors
from rayfed_lora.types import AdapterState, Factors


class FactorAverage:
    """A = sum p_k A_k and B = sum p_k B_k for each module; dense tensors likewise.

    p_k = weight_k / sum of weights; all clients have the same ranks. Biased: the product of the
    means is not the mean of the products; `Aggregate.error` says by how much. FedAvg is this rule
    on a state without factors.
    """

    def __init__(self) -> None:
        self._dense, self._a, self._b = TensorMean(), TensorMean(), TensorMean()
        self._exact: dict[str, ProductMean] = {}

    def add(self, weight: float, state: AdapterState) -> None:
        """Take one client in."""
        self._dense.add(weight, state.dense)
        self._a.add(weight, {name: f.a for name, f in state.factors.items()})
        self._b.add(weight, {name: f.b for name, f in state.factors.items()})
        for name, sent in state.factors.items():
            self._exact.setdefault(name, ProductMean()).add(weight, sent)

    def join(self, other: FactorAverage) -> None:
        """Take in what another reduction has."""
        self._dense.join(other._dense)
        self._a.join(other._a)
        self._b.join(other._b)
        for name, product in other._exact.items():
            self._exact.setdefault(name, ProductMean()).join(product)

    def aggregate(self, start: AdapterState, lr: float = 1.0) -> Aggregate:
        """Return start + lr * (mean - start), for A, B and the dense tensors."""
        a, b = self._a.mean(), self._b.mean()
        used = {n: (np.float64(f.scale) * b[n], a[n]) for n, f in start.factors.items()}
        factors = {
            name: Factors(stepped(f.a, a[name], lr), stepped(f.b, b[name], lr), f.scale)
            for name, f in start.factors.items()
        }
        state = AdapterState(factors, stepped_tensors(start.dense, self._dense.mean(), lr))
        exact = {name: self._exact[name].mean() for name in start.factors}
        return Aggregate(state, relative_error(used, exact))
