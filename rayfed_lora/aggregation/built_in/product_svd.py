"""FlexLoRA, HLoRA: the exact mean product, cut back to the rank. Source: arXiv:2402.11505."""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.means import Means, Product
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, error_of, stepped_mean
from rayfed_lora.lora.products import product_svd as svd_of_product
from rayfed_lora.lora.resize import from_svd
from rayfed_lora.types import AdapterState, Factors


@rule(
    "product-svd",
    needs="means",
    source="2402.11505",
    summary="the exact mean of the products, cut back to the rank (FlexLoRA)",
    method="flexlora",
    mixed_ranks=True,
)
def product_svd(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return the best approximation of sum p_k D_k at each module's rank; dense tensors averaged.

    D_k = scale_k * B_k @ A_k and p_k = weight_k / sum of weights. The sum is exact; its SVD runs
    through the QR core. Clients may have different ranks. The server's step is one in D.
    """
    exact = stepped_mean(start, means, step.lr)
    factors = {name: _cut(f, exact[name]) for name, f in start.factors.items()}
    state = AdapterState(factors, step(start.dense, means.tensors()))
    return Aggregate(state, {}, lambda: error_of(state, exact))


def _cut(start: Factors, target: Product) -> Factors:
    """Return the factors nearest the target, at the start's rank and scale."""
    b, a = target
    cut = from_svd(svd_of_product(b, a), start.rank, start.scale)
    missing = start.rank - cut.rank
    if missing == 0:
        return cut
    # The start's rank is above what D can have: its surplus rows stay, with zeros in B.
    columns = np.zeros((cut.b.shape[0], missing), np.float32)
    rows = start.a[start.rank - missing :]
    return Factors(
        np.concatenate([cut.a, rows]), np.concatenate([cut.b, columns], axis=1), cut.scale
    )
