"""FlexLoRA and HLoRA: the exact mean of the products, cut back to the rank.

Source: arXiv:2402.11505, "Federated fine-tuning of large language models under heterogeneous
tasks and client resources".
"""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.mean import ProductMean, TensorMean
from rayfed_lora.aggregation.step import (
    Aggregate,
    Product,
    relative_error,
    stepped_tensors,
)
from rayfed_lora.lora.products import product_svd, stacked
from rayfed_lora.lora.resize import from_svd
from rayfed_lora.types import AdapterState, Factors


class ProductSvd:
    """The best approximation of sum p_k D_k at each module's rank; dense tensors averaged.

    D_k = scale_k * B_k @ A_k and p_k = weight_k / sum of weights. The sum is exact; its SVD runs
    through the QR core. Clients may have different ranks.
    """

    def __init__(self) -> None:
        self._dense = TensorMean()
        self._exact: dict[str, ProductMean] = {}

    def add(self, weight: float, state: AdapterState) -> None:
        """Take one client in."""
        self._dense.add(weight, state.dense)
        for name, sent in state.factors.items():
            self._exact.setdefault(name, ProductMean()).add(weight, sent)

    def join(self, other: ProductSvd) -> None:
        """Take in what another reduction has."""
        self._dense.join(other._dense)
        for name, product in other._exact.items():
            self._exact.setdefault(name, ProductMean()).join(product)

    def aggregate(self, start: AdapterState, lr: float = 1.0) -> Aggregate:
        """Return D = start + lr * (mean - start), cut to the ranks and scales of `start`."""
        means = {name: self._exact[name].mean() for name in start.factors}
        exact = {name: _stepped(f, means[name], lr) for name, f in start.factors.items()}
        factors = {name: _cut(f, exact[name]) for name, f in start.factors.items()}
        used = {name: stacked([(1.0, f)]) for name, f in factors.items()}
        state = AdapterState(factors, stepped_tensors(start.dense, self._dense.mean(), lr))
        return Aggregate(state, relative_error(used, exact))


def _stepped(start: Factors, mean: Product, lr: float) -> Product:
    """Return D_start + lr * (D_mean - D_start), exactly."""
    if lr == 1.0:
        return mean
    old_b, old_a = stacked([(1.0 - lr, start)])
    return np.concatenate([old_b, lr * mean[0]], axis=1), np.concatenate([old_a, mean[1]])


def _cut(start: Factors, target: Product) -> Factors:
    """Return the factors nearest the target, at the start's rank and scale."""
    b, a = target
    cut = from_svd(product_svd(b, a), start.rank, start.scale)
    missing = start.rank - cut.rank
    if missing == 0:
        return cut
    # The start's rank is above what D can have: its surplus rows stay, with nothing in B.
    columns = np.zeros((cut.b.shape[0], missing), np.float32)
    rows = start.a[start.rank - missing :]
    return Factors(
        np.concatenate([cut.a, rows]), np.concatenate([cut.b, columns], axis=1), cut.scale
    )
