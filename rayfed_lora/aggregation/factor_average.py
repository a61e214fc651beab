"""Averages of the factors: FedIT, FFA-LoRA, RoLoRA and FedSA-LoRA.

Source: FedIT, arXiv:2305.05644; FFA-LoRA, arXiv:2403.12313; RoLoRA, arXiv:2409.02346; FedSA-LoRA,
arXiv:2410.01463.
"""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.step import (
    Aggregate,
    Product,
    ServerStep,
    error_of,
    stepped_product,
)
from rayfed_lora.lora.stacked import A, B, named
from rayfed_lora.types import AdapterState, Factors


def factor_average(start: AdapterState, means: Means, step: ServerStep) -> Aggregate:
    """Return A = sum p_k A_k and B = sum p_k B_k for each module; dense tensors likewise.

    p_k = weight_k / sum of weights; all clients have the same ranks. Biased: the product of the
    means is not the mean of the products. Where one factor is frozen (FFA-LoRA: A always; RoLoRA:
    A and B in turns) the other's average is exact. In FedSA-LoRA each client keeps its own B; the
    mean of those, which a real server does not see, only serves the tests of the global model.
    FedAvg is this rule on a state without factors.
    """
    state = averaged(start, means, step)
    return Aggregate(state, {}, lambda: step_error(start, state, means, step))


def step_error(
    start: AdapterState, state: AdapterState, means: Means, step: ServerStep
) -> float | None:
    """Return how far a stepped state is from the same step towards the exact mean."""
    if not step.linear:
        return None
    return error_of(state, stepped_mean(start, means, step.lr))


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


def exact_mean(start: AdapterState, means: Means) -> dict[str, Product]:
    """Return the exact mean of the clients' updates, in the order of `start`."""
    return {name: means.product(name) for name in start.factors}


def stepped_mean(start: AdapterState, means: Means, lr: float) -> dict[str, Product]:
    """Return D_start + lr * (D_mean - D_start), exactly, in the order of `start`."""
    return {
        name: stepped_product(start.factors[name], mean, lr)
        for name, mean in exact_mean(start, means).items()
    }
