"""FLoRA: the exact mean goes into the base, and LoRA starts anew. Source: arXiv:2409.05976."""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, stepped_mean
from rayfed_lora.types import AdapterState


def messages(sizes: AdapterRound) -> Traffic:
    """Return A and B up at each client's rank, and the factors of all that arrived down.

    The download is the result of the round; the state that the round starts from is not sent.
    """
    up = sizes.up(*sizes.trained)
    merge = int(sizes.factors("a", "b")[sizes.arrived].sum())
    down = np.full_like(up, merge + sizes.head)
    return Traffic(up, down, merge, frozen={"head": sizes.head}, renewed=("head",))


@rule(
    "stacking",
    needs="means",
    source="2409.05976",
    summary="the exact mean goes into the base, LoRA starts anew each round (FLoRA)",
    method="flora",
    messages=messages,
    mixed_ranks=True,
    restarts=True,
)
def stacking(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Merge sum p_k D_k, exactly, into the base; LoRA starts anew. Clients' ranks may differ.

    The clients' factors, stacked, are the factors of the sum: their rank is the sum of r_k.
    """
    exact = stepped_mean(start, means, step.lr)
    merged = {name: update for name, update in exact.items() if update[0].shape[1] > 0}
    state = AdapterState({}, step(start.dense, means.tensors()))
    return Aggregate(state, merged, lambda: 0.0 if exact else None)
