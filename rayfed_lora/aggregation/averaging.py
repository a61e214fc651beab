"""Averages of A and of B, exact means, and steps towards them, for several rules.

Source: docs/method.md, "Aggregation rules".
"""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.step import Product, ServerStep, error_of, stepped_product
from rayfed_lora.lora.stacked import A, B, named
from rayfed_lora.types import AdapterState, Factors


def averaged(start: AdapterState, means: Means, step: ServerStep) -> AdapterState:
    """Return the state after a step towards the means of all tensors but the frozen ones."""
    frozen = {"a": A, "b": B, None: None}[step.frozen]
    live = {
        name: tensor
        for name, tensor in named(start).items()
        if frozen is None or not name.startswith(frozen)
    }
    stepped = step(live, means.tensors())
    factors = {
        name: Factors(stepped.get(A + name, f.a), stepped.get(B + name, f.b), f.scale)
        for name, f in start.factors.items()
    }
    return AdapterState(factors, {name: stepped[name] for name in start.dense})


def stepped_mean(start: AdapterState, means: Means, lr: float) -> dict[str, Product]:
    """Return D_start + lr * (D_mean - D_start), exactly, by module in the order of `start`."""
    return {
        name: stepped_product(factors, means.product(name), lr)
        for name, factors in start.factors.items()
    }


def step_error(
    start: AdapterState, state: AdapterState, means: Means, step: ServerStep
) -> float | None:
    """Return how far a stepped state is from the same step towards the exact mean.

    None without factors, and where the step is not linear.
    """
    if not step.linear:
        return None
    return error_of(state, stepped_mean(start, means, step.lr))
