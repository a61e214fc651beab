"""FFA-LoRA: A stays as drawn, so that the average of B is exact. Source: arXiv:2403.12313."""

from __future__ import annotations

from dataclasses import replace

from rayfed_lora.aggregation.factor_average import factor_average
from rayfed_lora.aggregation.messages import AdapterRound, Traffic, trained_factors
from rayfed_lora.aggregation.rule import Rule


def messages(sizes: AdapterRound) -> Traffic:
    """Return B both ways; a client draws A from the seed, or is sent it after a cut."""
    return replace(trained_factors(sizes), frozen=sizes.whole("a"))


RULE = Rule(
    name="freeze-a",
    source="2403.12313",
    summary="A stays as drawn (FFA-LoRA)",
    method="ffa-lora",
    aggregate=factor_average,
    kept=frozenset({"factors"}),
    messages=messages,
    frozen=lambda turn: "a",
    optimizers=True,
)
