"""RoLoRA: B and A are trained in turns, so that each average is exact. Source: arXiv:2409.02346."""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged_factors
from rayfed_lora.types import AdapterState


def messages(sizes: AdapterRound) -> Traffic:
    """Return the trained factor both ways; its download is the result of the round."""
    up = sizes.up(*sizes.trained)
    frozen = {**sizes.whole("a", "b"), "head": sizes.head}
    return Traffic(up, up, frozen=frozen, renewed=(*sizes.trained, "head"))


@rule(
    "alternate",
    needs="means",
    source="2409.02346",
    summary="B and A in turns (RoLoRA)",
    method="rolora",
    kept=("factors",),
    messages=messages,
    # B is trained first: A has no gradient while B = 0.
    frozen=lambda turn: "a" if turn % 2 == 0 else "b",
    optimizers=True,
    mean_only=True,
)
def alternate(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return the means of A and of B apart, as `factor_average` does."""
    return averaged_factors(start, means, step)
