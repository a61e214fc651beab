"""FedSA-LoRA: A is averaged, each client keeps its own B. Source: arXiv:2410.01463."""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged_factors
from rayfed_lora.types import AdapterState


def messages(sizes: AdapterRound) -> Traffic:
    """Return A both ways."""
    return Traffic(sizes.up("a"), sizes.down("a"))


# The mean of the clients' B, which a real server does not see, serves tests of the global model.
@rule(
    "share-a",
    needs="means",
    source="2410.01463",
    summary="clients keep their own B (FedSA-LoRA)",
    method="fedsa-lora",
    kept=("factors",),
    messages=messages,
    personal=True,
    optimizers=True,
)
def share_a(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return the means of A and of B apart, as `factor_average` does."""
    return averaged_factors(start, means, step)
