"""LoRA-FAIR: the factor average, with B corrected towards the exact mean.

Source: arXiv:2411.14961. The paper measures the distance to the exact mean by cosine similarity;
this is the least-squares form, which has a closed solution.
"""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.means import Means, Product
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged, error_of, stepped_mean
from rayfed_lora.types import AdapterState, Factors, FloatArray

# Share of the mean eigenvalue of A A^T that the ridge adds to it.
RIDGE = 0.01


@rule(
    "correct",
    needs="means",
    source="2411.14961",
    summary="factor-average with B moved towards the exact mean (LoRA-FAIR)",
    method="lora-fair",
    kept=("factors",),
)
def correct(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return the factor average with B + dB in place of B.

    dB minimises ||s (B + dB) A - D||^2 + s^2 ridge ||dB||^2, with D = sum p_k D_k (a step of the
    server towards it) and ridge = RIDGE * trace(A A^T) / r.
    """
    state = averaged(start, means, step)
    exact = stepped_mean(start, means, step.lr)
    factors = {name: _corrected(f, exact[name]) for name, f in state.factors.items()}
    corrected = AdapterState(factors, state.dense)
    return Aggregate(corrected, {}, lambda: error_of(corrected, exact))


def _corrected(mean: Factors, exact: Product) -> Factors:
    """Return the factors with dB added to B."""
    if mean.rank == 0:
        return mean
    a, b = mean.a.astype(np.float64), mean.b.astype(np.float64)
    gram = a @ a.T
    ridge = RIDGE * np.trace(gram) / mean.rank
    # (D_exact / s - B A) A^T, without ever forming a d_out x d_in matrix.
    missing = exact[0] @ (exact[1] @ a.T) / mean.scale - b @ gram
    delta = np.linalg.solve(gram + ridge * np.eye(mean.rank), missing.T).T
    moved: FloatArray = (b + delta).astype(np.float32)
    return Factors(mean.a, moved, mean.scale)
