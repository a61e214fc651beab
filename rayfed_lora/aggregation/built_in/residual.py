"""FedEx-LoRA: means of A and of B, the residual into the base. Source: arXiv:2410.09432."""

from __future__ import annotations

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, averaged, difference, product, stepped_mean
from rayfed_lora.types import AdapterState


def messages(sizes: AdapterRound) -> Traffic:
    """Return A and B both ways, and the factors of the residual down.

    The residual has rank (clients - 1) * r, or clients * r where the server's learning rate is not
    1: the start is then one more term. Its matrix is sent instead where that is smaller. The
    download is the result of the round.
    """
    up = sizes.up(*sizes.trained)
    times = max(int(sizes.arrived.sum()) - 1 + sizes.stepped, 0)
    merge = sum(
        min(times * sizes.ranks[name] * (m.d_in + m.d_out), m.d_in * m.d_out)
        for name, m in sizes.modules.items()
    )
    frozen = {**sizes.whole("a", "b"), "head": sizes.head}
    return Traffic(up, up + merge, merge, frozen=frozen, renewed=("a", "b", "head"))


@rule(
    "residual",
    needs="means",
    source="2410.09432",
    summary="factor-average, its residual to the exact mean goes into the base (FedEx-LoRA)",
    method="fedex-lora",
    kept=("factors",),
    messages=messages,
)
def residual(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Average the factors, and merge sum p_k D_k minus their product into the base."""
    state = averaged(start, means, step)
    exact = stepped_mean(start, means, step.lr)
    merged = {
        name: difference(exact[name], product(f)) for name, f in state.factors.items() if f.rank > 0
    }
    return Aggregate(state, merged, lambda: 0.0 if exact else None)
