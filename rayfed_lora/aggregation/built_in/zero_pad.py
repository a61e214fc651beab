"""HetLoRA: factors padded to the largest rank, clients weighted by the size of their update.

Source: arXiv:2401.06432, its sparsity-weighted aggregation; not its pruning of ranks.
"""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, step_error, stepped_towards
from rayfed_lora.lora.stacked import A, B
from rayfed_lora.types import AdapterState


@rule(
    "zero-pad",
    needs="means",
    source="2401.06432",
    summary="padded to the largest rank, weighted by update size (HetLoRA)",
    method="hetlora",
    kept=("padded",),
    mixed_ranks=True,
    optimizers=True,
)
def zero_pad(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return sum w_k pad(A_k), sum w_k pad(B_k); dense tensors averaged by examples.

    w_k = ||D_k|| / sum over clients of ||D_k||, with ||D_k|| the Frobenius norm over all modules.
    Rows of A and columns of B beyond the largest rank of this round's clients stay as they are,
    and so does all of A and B where no client has moved from D = 0.
    """
    found = means.tensors()
    for name, f in start.factors.items():
        mean = means.padded(name)
        a, b = (part.astype(np.float64) for part in (f.a, f.b))
        if mean is not None:
            rank = mean[1].shape[0]
            b[:, :rank], a[:rank] = mean[0], mean[1]
        found |= {A + name: a, B + name: b}
    state = stepped_towards(found, start, step)
    return Aggregate(state, {}, lambda: step_error(start, state, means, step))
