"""FFA-LoRA: A stays as drawn, so that the average of B is exact. Source: arXiv:2403.12313."""

from __future__ import annotations

from dataclasses import replace

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic, trained_factors
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged_factors
from rayfed_lora.types import AdapterState


def messages(sizes: AdapterRound) -> Traffic:
    """Return B both ways; a client draws A from the seed, or is sent it after a cut."""
    return replace(trained_factors(sizes), frozen=sizes.whole("a"))


@rule(
    "freeze-a",
    needs="means",
    source="2403.12313",
    summary="A stays as drawn (FFA-LoRA)",
    method="ffa-lora",
    kept=("factors",),
    messages=messages,
    frozen=lambda turn: "a",
    optimizers=True,
    mean_only=True,
)
def freeze_a(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return the means of A and of B apart, as `factor_average` does."""
    return averaged_factors(start, means, step)
