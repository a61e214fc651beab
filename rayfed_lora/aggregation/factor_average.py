"""FedIT: the means of A and of B apart. Source: arXiv:2305.05644."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rayfed_lora.aggregation.mean import ProductMean, TensorMean
from rayfed_lora.aggregation.step import (
    Aggregate,
    WeightedState,
    relative_error,
    stepped,
    stepped_tensors,
)
from rayfed_lora.types import AdapterState, Factors


def factor_average(
    start: AdapterState, updates: Iterable[WeightedState], lr: float = 1.0
) -> Aggregate:
    """Return A = sum p_k A_k and B = sum p_k B_k for each module; dense tensors likewise.

    p_k = weight_k / sum of weights. Biased: the product of the means is not the mean of the
    products; `Aggregate.error` says by how much. FedAvg is this rule on a state without factors.

    Args:
        start: the state the clients started from.
        updates: (examples, state) of each client, in client order, at least one; same ranks.
        lr: server learning rate, 1 for plain averaging.
    """
    dense = TensorMean()
    a_means, b_means = TensorMean(), TensorMean()
    exact = {name: ProductMean() for name in start.factors}
    for weight, state in updates:
        dense.add(weight, state.dense)
        a_means.add(weight, {name: f.a for name, f in state.factors.items()})
        b_means.add(weight, {name: f.b for name, f in state.factors.items()})
        for name, sent in state.factors.items():
            exact[name].add(weight, sent)
    a, b = a_means.mean(), b_means.mean()
    used = {name: (np.float64(f.scale) * b[name], a[name]) for name, f in start.factors.items()}
    factors = {
        name: Factors(stepped(f.a, a[name], lr), stepped(f.b, b[name], lr), f.scale)
        for name, f in start.factors.items()
    }
    state = AdapterState(factors, stepped_tensors(start.dense, dense.mean(), lr))
    return Aggregate(state, relative_error(used, {m: p.mean() for m, p in exact.items()}))
