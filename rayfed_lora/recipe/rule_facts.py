"""What the rest of the program must know of each aggregation rule; their code: `aggregation`.

Source: docs/method.md, "Aggregation rules".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rayfed_lora.types import Frozen


@dataclass(frozen=True)
class RuleFacts:
    """What sets a rule apart.

    Attributes:
        source: arXiv number.
        mixed_ranks: whether clients may have different ranks.
        trains: which factors clients train and send: `both`, `b`, or `turns` (B, then A, ...).
        personal: whether each client keeps its own B, and sends A only.
        merges: what goes into the frozen base each round, and is sent to all for that: nothing,
            the clients' factors (`stack`), or what the average lacks of the mean (`residual`).
        optimizers: whether server optimisers beside sgd make sense: the step is one of A and B.
    """

    source: str
    mixed_ranks: bool = False
    trains: Literal["both", "b", "turns"] = "both"
    personal: bool = False
    merges: Literal["stack", "residual"] | None = None
    optimizers: bool = False

    def frozen(self, turn: int) -> Frozen | None:
        """Return the factor that clients do not train.

        Args:
            turn: number of adapter rounds before this one. B comes first: A has no gradient while
                B = 0.
        """
        if self.trains == "both":
            return None
        return "a" if self.trains == "b" or turn % 2 == 0 else "b"


RULE_FACTS: Mapping[str, RuleFacts] = {
    "factor-average": RuleFacts("2305.05644", optimizers=True),
    "product-svd": RuleFacts("2402.11505", mixed_ranks=True),
    "stacking": RuleFacts("2409.05976", mixed_ranks=True, merges="stack"),
    "residual": RuleFacts("2410.09432", merges="residual"),
    "freeze-a": RuleFacts("2403.12313", trains="b", optimizers=True),
    "alternate": RuleFacts("2409.02346", trains="turns", optimizers=True),
    "zero-pad": RuleFacts("2401.06432", mixed_ranks=True, optimizers=True),
    "share-a": RuleFacts("2410.01463", personal=True, optimizers=True),
    "correct": RuleFacts("2411.14961"),
}
