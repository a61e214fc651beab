"""FedSA-LoRA: A is averaged, each client keeps its own B. Source: arXiv:2410.01463."""

from __future__ import annotations

from rayfed_lora.aggregation.factor_average import factor_average
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import Rule


def messages(sizes: AdapterRound) -> Traffic:
    """Return A both ways."""
    return Traffic(sizes.up("a"), sizes.down("a"))


# The mean of the clients' B, which a real server does not see, serves tests of the global model.
RULE = Rule(
    name="share-a",
    source="2410.01463",
    summary="clients keep their own B (FedSA-LoRA)",
    method="fedsa-lora",
    aggregate=factor_average,
    kept=frozenset({"factors"}),
    messages=messages,
    personal=True,
    optimizers=True,
)
