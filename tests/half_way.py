"""A user's rule in one file: half a step to the mean; half of A, all of B are uploaded."""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged
from rayfed_lora.types import AdapterState, Factors, FloatArray


def messages(sizes: AdapterRound) -> Traffic:
    """Return half of A, all of B and the head up; A, B and the head down."""
    return Traffic(sizes.up("b") + sizes.factors("a") // 2, sizes.down("a", "b"))


@rule(needs="means", kept=("factors",), messages=messages)
def half_way(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Go half of the way to the means of A and of B."""
    stepped = averaged(start, means, step)

    def middle(one: FloatArray, other: FloatArray) -> FloatArray:
        return (one + other) / 2

    factors = {
        name: Factors(
            middle(f.a, stepped.factors[name].a), middle(f.b, stepped.factors[name].b), f.scale
        )
        for name, f in start.factors.items()
    }
    dense = {name: middle(x, stepped.dense[name]) for name, x in start.dense.items()}
    return Aggregate(AdapterState(factors, dense), {}, lambda: None)
