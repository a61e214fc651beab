"""Rules whose result goes into the frozen base, wholly or in part: FLoRA and FedEx-LoRA.

Source: FLoRA, arXiv:2409.05976; FedEx-LoRA, arXiv:2410.09432.
"""

from __future__ import annotations

from rayfed_lora.aggregation.factor_average import averaged, stepped_mean
from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.step import Aggregate, ServerStep, difference, product
from rayfed_lora.types import AdapterState


def stacking(start: AdapterState, means: Means, step: ServerStep) -> Aggregate:
    """Merge sum p_k D_k, exactly, into the base; LoRA starts anew. Clients' ranks may differ.

    The clients' factors, stacked, are the factors of the sum: their rank is the sum of r_k.
    """
    exact = stepped_mean(start, means, step.lr)
    merged = {name: update for name, update in exact.items() if update[0].shape[1] > 0}
    state = AdapterState({}, step(start.dense, means.tensors()))
    return Aggregate(state, merged, lambda: 0.0 if exact else None)


def residual(start: AdapterState, means: Means, step: ServerStep) -> Aggregate:
    """Average the factors, and merge what their product lacks of sum p_k D_k into the base."""
    state = averaged(start, means, step)
    exact = stepped_mean(start, means, step.lr)
    merged = {
        name: difference(exact[name], product(f)) for name, f in state.factors.items() if f.rank > 0
    }
    return Aggregate(state, merged, lambda: 0.0 if exact else None)
