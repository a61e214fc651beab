"""FedIT: the means of A and of B apart. Source: arXiv:2305.05644."""

from __future__ import annotations

from rayfed_lora.aggregation.mean import ProductMean, TensorMean
from rayfed_lora.aggregation.step import Aggregate, relative_error, stepped, stepped_tensors
from rayfed_lora.types import AdapterState, Factors

# Before a module's name; no parameter's name starts so.
_A, _B = "A of ", "B of "


class FactorAverage:
    """A = sum p_k A_k and B = sum p_k B_k for each module; dense tensors likewise.

    p_k = weight_k / sum of weights; all clients have the same ranks. Biased: the product of the
    means is not the mean of the products; `Aggregate.error` says by how much. FedAvg is this rule
    on a state without factors.
    """

    def __init__(self) -> None:
        self._tensors = TensorMean()
        self._exact: dict[str, ProductMean] = {}

    def add(self, weight: float, state: AdapterState) -> None:
        """Take one client in."""
        tensors = dict(state.dense)
        for name, f in state.factors.items():
            tensors |= {_A + name: f.a, _B + name: f.b}
        self._tensors.add(weight, tensors)
        for name, sent in state.factors.items():
            self._exact.setdefault(name, ProductMean()).add(weight, sent)

    def join(self, other: FactorAverage) -> None:
        """Take in what another reduction has."""
        self._tensors.join(other._tensors)
        for name, product in other._exact.items():
            self._exact.setdefault(name, ProductMean()).join(product)

    def aggregate(self, start: AdapterState, lr: float = 1.0) -> Aggregate:
        """Return start + lr * (mean - start), for A, B and the dense tensors."""
        means = self._tensors.mean()
        used = {n: (f.scale * means[_B + n], means[_A + n]) for n, f in start.factors.items()}
        factors = {
            name: Factors(
                stepped(f.a, means[_A + name], lr), stepped(f.b, means[_B + name], lr), f.scale
            )
            for name, f in start.factors.items()
        }
        state = AdapterState(factors, stepped_tensors(start.dense, means, lr))
        exact = {name: self._exact[name].mean() for name in start.factors}
        return Aggregate(state, relative_error(used, exact))
