"""The one table of aggregation rules.

Source: method.md, "Aggregation rules"; each rule's own file names its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rayfed_lora.aggregation.correct import correct
from rayfed_lora.aggregation.factor_average import factor_average
from rayfed_lora.aggregation.means import Kept, Means
from rayfed_lora.aggregation.merging import residual, stacking
from rayfed_lora.aggregation.product_svd import product_svd
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, ServerStep
from rayfed_lora.aggregation.zero_pad import zero_pad
from rayfed_lora.recipe import ServerOptimizer
from rayfed_lora.types import AdapterState, Frozen

Rule = Callable[[AdapterState, Means, ServerStep], Aggregate]


@dataclass(frozen=True)
class RuleEntry:
    """A rule and what the rest of the program must know of it.

    Attributes:
        rule: the next global state from the one the clients started from and their means.
        source: arXiv number.
        kept: what the means must hold for it.
        mixed_ranks: whether clients may have different ranks.
        trains: which factors clients train and send: `both`, `b`, or `turns` (B, then A, ...).
        personal: whether each client keeps its own B, and sends A only.
        merges: what goes into the frozen base each round, and is sent to all for that: nothing,
            the clients' factors (`stack`), or what the average lacks of the mean (`residual`).
        optimizers: whether server optimisers beside sgd make sense: the step is one of A and B.
    """

    rule: Rule
    source: str
    kept: frozenset[Kept] = frozenset()
    mixed_ranks: bool = False
    trains: Literal["both", "b", "turns"] = "both"
    personal: bool = False
    merges: Literal["stack", "residual"] | None = None
    optimizers: bool = False

    def means(self) -> Means:
        """Return means that have taken no client in yet."""
        return Means(self.kept)

    def frozen(self, turn: int) -> Frozen | None:
        """Return the factor that clients do not train.

        Args:
            turn: number of adapter rounds before this one. B comes first: A has no gradient while
                B = 0.
        """
        if self.trains == "both":
            return None
        return "a" if self.trains == "b" or turn % 2 == 0 else "b"

    def aggregate(
        self,
        start: AdapterState,
        updates: Iterable[tuple[float, AdapterState]],
        step: ServerStep | None = None,
    ) -> Aggregate:
        """Return the next global state from (weight, state) of each client, at least one."""
        means = self.means()
        for weight, state in updates:
            means.add(weight, state)
        return self.rule(start, means, step or OptimizerStep(ServerOptimizer()))


_FACTORS: frozenset[Kept] = frozenset({"factors"})

RULES: Mapping[str, RuleEntry] = {
    "factor-average": RuleEntry(factor_average, "2305.05644", _FACTORS, optimizers=True),
    "product-svd": RuleEntry(product_svd, "2402.11505", mixed_ranks=True),
    "stacking": RuleEntry(stacking, "2409.05976", mixed_ranks=True, merges="stack"),
    "residual": RuleEntry(residual, "2410.09432", _FACTORS, merges="residual"),
    "freeze-a": RuleEntry(factor_average, "2403.12313", _FACTORS, trains="b", optimizers=True),
    "alternate": RuleEntry(factor_average, "2409.02346", _FACTORS, trains="turns", optimizers=True),
    "zero-pad": RuleEntry(
        zero_pad, "2401.06432", frozenset({"padded"}), mixed_ranks=True, optimizers=True
    ),
    "share-a": RuleEntry(factor_average, "2410.01463", _FACTORS, personal=True, optimizers=True),
    "correct": RuleEntry(correct, "2411.14961", _FACTORS),
}
