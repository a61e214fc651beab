"""What rules are made of: averages, exact means, steps towards them, distances from them.

Source: docs/method.md, "Aggregation rules"; the server's step: `server_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rayfed_lora.aggregation.means import Float64Array, Means, Product
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.lora.products import WeightedProduct, norm
from rayfed_lora.lora.stacked import A, B, named
from rayfed_lora.types import AdapterState, Factors


@dataclass(frozen=True)
class Aggregate:
    """The next global state, and how far the rule is from the exact mean.

    Attributes:
        state: same modules, scales and tensor names as the state the clients started from; no
            factors where the rule lets LoRA start anew.
        merged: update by module that goes into the frozen base; empty for most rules.
        measure: computes ||D_used - D_exact||_F / ||D_exact||_F over all modules. D_exact is the
            same step towards the exact mean; None without factors, and where the step is not
            linear.
    """

    state: AdapterState
    merged: Mapping[str, Product]
    measure: Callable[[], float | None]


def averaged(start: AdapterState, means: Means, step: OptimizerStep) -> AdapterState:
    """Return the state after a step towards the means of all tensors but the frozen ones."""
    return stepped_towards(means.tensors(), start, step)


def averaged_factors(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return A = sum p_k A_k and B = sum p_k B_k for each module; dense tensors likewise.

    p_k = weight_k / sum of weights; all clients have the same ranks.
    """
    state = averaged(start, means, step)
    return Aggregate(state, {}, lambda: step_error(start, state, means, step))


def stepped_towards(
    targets: Mapping[str, Float64Array], start: AdapterState, step: OptimizerStep
) -> AdapterState:
    """Return the state after a step towards tensors, by `named`; frozen ones stay."""
    frozen = {"a": A, "b": B, None: None}[step.frozen]
    live = {
        name: tensor
        for name, tensor in named(start).items()
        if frozen is None or not name.startswith(frozen)
    }
    stepped = step(live, targets)
    factors = {
        name: Factors(stepped.get(A + name, f.a), stepped.get(B + name, f.b), f.scale)
        for name, f in start.factors.items()
    }
    return AdapterState(factors, {name: stepped[name] for name in start.dense})


def stepped_mean(start: AdapterState, means: Means, lr: float) -> dict[str, Product]:
    """Return D_start + lr * (D_mean - D_start), exactly, by module in the order of `start`."""
    return {name: _stepped(f, means.product(name), lr) for name, f in start.factors.items()}


def _stepped(start: Factors, mean: Product, lr: float) -> Product:
    if lr == 1.0:
        return mean
    old_b, old_a = WeightedProduct.of(1.0 - lr, start).weighted()
    return np.concatenate([old_b, lr * mean[0]], axis=1), np.concatenate([old_a, mean[1]])


def step_error(
    start: AdapterState, state: AdapterState, means: Means, step: OptimizerStep
) -> float | None:
    """Return how far a stepped state is from the same step towards the exact mean.

    None without factors, and where the step is not linear.
    """
    return error_of(state, stepped_mean(start, means, step.lr)) if step.linear else None


def error_of(state: AdapterState, exact: Mapping[str, Product]) -> float | None:
    """Return `relative_error` of a state's effective updates."""
    return relative_error({name: product(f) for name, f in state.factors.items()}, exact)


def relative_error(used: Mapping[str, Product], exact: Mapping[str, Product]) -> float | None:
    """Return ||D_used - D_exact||_F / ||D_exact||_F over all modules.

    0 where both vanish, inf where only the exact one does, None without modules.
    """
    if not exact:
        return None
    distance = float(np.linalg.norm([_distance(used[m], exact[m]) for m in exact]))
    size = float(np.linalg.norm([norm(b, a) for b, a in exact.values()]))
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size


def product(factors: Factors) -> Product:
    """Return the effective update of some factors."""
    return WeightedProduct.of(1.0, factors).weighted()


def difference(one: Product, other: Product) -> Product:
    """Return one product minus another, as a product."""
    (b, a), (other_b, other_a) = one, other
    return np.concatenate([b, -other_b], axis=1), np.concatenate([a, other_a])


def _distance(one: Product, other: Product) -> float:
    """Return the Frobenius norm of the difference of two products."""
    (b, a), (other_b, other_a) = one, other
    if b.shape[1] + other_b.shape[1] < min(b.shape[0], a.shape[1]):
        return norm(*difference(one, other))
    return float(np.linalg.norm(b @ a - other_b @ other_a))
