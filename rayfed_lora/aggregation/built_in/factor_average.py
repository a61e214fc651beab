"""FedIT: the means of A and of B apart. Source: arXiv:2305.05644."""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged_factors
from rayfed_lora.types import AdapterState


@rule(
    "factor-average",
    needs="means",
    source="2305.05644",
    summary="means of A and of B apart (FedIT)",
    method="fedlora",
    kept=("factors",),
    optimizers=True,
    mean_only=True,
)
def factor_average(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return A = sum p_k A_k and B = sum p_k B_k for each module; dense tensors likewise.

    p_k = weight_k / sum of weights; all clients have the same ranks. Biased: the product of the
    means is not the mean of the products. With a frozen factor the average of the other one is
    exact. FedAvg is this rule on a state without factors.
    """
    return averaged_factors(start, means, step)
