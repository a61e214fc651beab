"""The one table of aggregation rules.

Source: method.md, "Aggregation rules"; each rule's own file names its paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rayfed_lora.aggregation.factor_average import factor_average
from rayfed_lora.aggregation.product_svd import product_svd
from rayfed_lora.aggregation.step import Rule


@dataclass(frozen=True)
class RuleEntry:
    """A rule and what the rest of the program must know of it.

    Attributes:
        aggregate: the rule itself.
        mixed_ranks: whether clients may have different ranks.
        source: arXiv number.
    """

    aggregate: Rule
    mixed_ranks: bool
    source: str


RULES: Mapping[str, RuleEntry] = {
    "factor-average": RuleEntry(factor_average, mixed_ranks=False, source="2305.05644"),
    "product-svd": RuleEntry(product_svd, mixed_ranks=True, source="2402.11505"),
}
