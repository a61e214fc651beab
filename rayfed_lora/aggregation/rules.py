"""The one table of aggregation rules.

Source: docs/method.md, "Aggregation rules"; each rule's own file names its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rayfed_lora.aggregation.correct import correct
from rayfed_lora.aggregation.factor_average import factor_average
from rayfed_lora.aggregation.means import Kept, Means
from rayfed_lora.aggregation.merging import residual, stacking
from rayfed_lora.aggregation.product_svd import product_svd
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, ServerStep
from rayfed_lora.aggregation.zero_pad import zero_pad
from rayfed_lora.recipe.recipe import ServerOptimizer
from rayfed_lora.recipe.rule_facts import RULE_FACTS, RuleFacts
from rayfed_lora.types import AdapterState

Rule = Callable[[AdapterState, Means, ServerStep], Aggregate]


@dataclass(frozen=True, kw_only=True)
class RuleEntry(RuleFacts):
    """A rule and its facts.

    Attributes:
        rule: the next global state from the one the clients started from and their means.
        kept: what the means must hold for it.
    """

    rule: Rule
    kept: frozenset[Kept]

    def means(self) -> Means:
        """Return means that have taken no client in yet."""
        return Means(self.kept)

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
_PADDED: frozenset[Kept] = frozenset({"padded"})
_CODE: Mapping[str, tuple[Rule, frozenset[Kept]]] = {
    "factor-average": (factor_average, _FACTORS),
    "product-svd": (product_svd, frozenset()),
    "stacking": (stacking, frozenset()),
    "residual": (residual, _FACTORS),
    "freeze-a": (factor_average, _FACTORS),
    "alternate": (factor_average, _FACTORS),
    "zero-pad": (zero_pad, _PADDED),
    "share-a": (factor_average, _FACTORS),
    "correct": (correct, _FACTORS),
}

RULES: Mapping[str, RuleEntry] = {
    name: RuleEntry(**vars(facts), rule=_CODE[name][0], kept=_CODE[name][1])
    for name, facts in RULE_FACTS.items()
}
