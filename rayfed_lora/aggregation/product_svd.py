"""FlexLoRA and HLoRA: the exact mean of the products, cut back to the rank.

Source: arXiv:2402.11505, "Federated fine-tuning of large language models under heterogeneous
tasks and client resources".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rayfed_lora.aggregation.mean import ProductMean, TensorMean
from rayfed_lora.aggregation.step import (
    Aggregate,
    Product,
    WeightedState,
    relative_error,
    stepped_tensors,
)
from rayfed_lora.lora.products import product_svd as svd_of_product
from rayfed_lora.lora.products import stacked
from rayfed_lora.lora.resize import from_svd
from rayfed_lora.types import AdapterState, Factors


def product_svd(
    start: AdapterState, updates: Iterable[WeightedState], lr: float = 1.0
) -> Aggregate:
    """Return the best approximation of sum p_k D_k at each module's rank; dense tensors averaged.

    D_k = scale_k * B_k @ A_k and p_k = weight_k / sum of weights. The sum is exact, as stacked
    factors; its SVD runs through the QR core. Clients may have different ranks.

    Args:
        start: the state the clients started from; its ranks and scales are kept.
        updates: (examples, state) of each client, in client order, at least one.
        lr: server learning rate on D, 1 for plain averaging.
    """
    dense = TensorMean()
    exact = {name: ProductMean() for name in start.factors}
    for weight, state in updates:
        dense.add(weight, state.dense)
        for name, sent in state.factors.items():
            exact[name].add(weight, sent)
    means = {name: product.mean() for name, product in exact.items()}
    stepped = {name: _stepped(f, means[name], lr) for name, f in start.factors.items()}
    factors = {name: _cut(f, stepped[name]) for name, f in start.factors.items()}
    used = {name: stacked([(1.0, f)]) for name, f in factors.items()}
    state = AdapterState(factors, stepped_tensors(start.dense, dense.mean(), lr))
    return Aggregate(state, relative_error(used, stepped))


def _stepped(start: Factors, mean: Product, lr: float) -> Product:
    """Return D_start + lr * (D_mean - D_start), exactly."""
    if lr == 1.0:
        return mean
    old_b, old_a = stacked([(1.0 - lr, start)])
    return np.concatenate([old_b, lr * mean[0]], axis=1), np.concatenate([old_a, mean[1]])


def _cut(start: Factors, target: Product) -> Factors:
    """Return the factors nearest the target, at the start's rank and scale."""
    b, a = target
    cut = from_svd(svd_of_product(b, a), start.rank, start.scale)
    missing = start.rank - cut.rank
    if missing == 0:
        return cut
    # The start's rank is above what D can have: its surplus rows stay, with nothing in B.
    columns = np.zeros((cut.b.shape[0], missing), np.float32)
    rows = start.a[start.rank - missing :]
    return Factors(
        np.concatenate([cut.a, rows]), np.concatenate([cut.b, columns], axis=1), cut.scale
    )
