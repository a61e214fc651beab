"""The one table of aggregation rules.

Source: method.md, "Aggregation rules"; each rule's own file names its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rayfed_lora.aggregation.factor_average import FactorAverage
from rayfed_lora.aggregation.product_svd import ProductSvd
from rayfed_lora.aggregation.step import Aggregate, Reduction
from rayfed_lora.types import AdapterState


@dataclass(frozen=True)
class RuleEntry:
    """A rule and what the rest of the program must know of it.

    Attributes:
        reduction: makes the rule's empty reduction.
        mixed_ranks: whether clients may have different ranks.
        source: arXiv number.
    """

    reduction: Callable[[], Reduction]
    mixed_ranks: bool
    source: str

    def aggregate(
        self, start: AdapterState, updates: Iterable[tuple[float, AdapterState]], lr: float = 1.0
    ) -> Aggregate:
        """Return the next global state from (weight, state) of each client, at least one."""
        reduction = self.reduction()
        for weight, state in updates:
            reduction.add(weight, state)
        return reduction.aggregate(start, lr)


RULES: Mapping[str, RuleEntry] = {
    "factor-average": RuleEntry(FactorAverage, mixed_ranks=False, source="2305.05644"),
    "product-svd": RuleEntry(ProductSvd, mixed_ranks=True, source="2402.11505"),
}
