"""RoLoRA: B and A are trained in turns, so that each average is exact. Source: arXiv:2409.02346."""

from __future__ import annotations

from rayfed_lora.aggregation.factor_average import factor_average
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import Rule


def messages(sizes: AdapterRound) -> Traffic:
    """Return the trained factor both ways; its download is the result of the round."""
    up = sizes.up(*sizes.trained)
    frozen = {**sizes.whole("a", "b"), "head": sizes.head}
    return Traffic(up, up, frozen=frozen, renewed=(*sizes.trained, "head"))


RULE = Rule(
    name="alternate",
    source="2409.02346",
    summary="B and A in turns (RoLoRA)",
    method="rolora",
    aggregate=factor_average,
    kept=frozenset({"factors"}),
    messages=messages,
    # B is trained first: A has no gradient while B = 0.
    frozen=lambda turn: "a" if turn % 2 == 0 else "b",
    optimizers=True,
)
