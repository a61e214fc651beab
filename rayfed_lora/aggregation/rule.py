"""An aggregation rule as one object: its facts, its code and its messages.

A new rule is a file that defines a `Rule`, and a line in `rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rayfed_lora.aggregation.means import Kept, Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic, trained_factors
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate
from rayfed_lora.types import AdapterState, Frozen


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How client updates become the next global state, and the size of its messages.

    Attributes:
        name: the value of `aggregation.rule`.
        source: arXiv number.
        summary: one line for the documentation of `aggregation.rule`.
        aggregate: computes the next global state from the one that the clients started from, the
            means of their updates and the server's step.
        kept: what the means must hold for it, beside the dense tensors and the exact updates.
        messages: computes the sizes of an adapter round's messages.
        frozen: returns the factor that clients do not train, from the number of adapter rounds
            before this one.
        method: name of the preset that trains an adapter of one rank under this rule, if any.
        mixed_ranks: whether clients may have different ranks.
        optimizers: whether server optimisers beside sgd make sense: the step is one of A and B.
        personal: whether each client keeps its own B, and sends A only.
        restarts: whether each round merges the whole mean into the base and starts LoRA anew.
    """

    name: str
    source: str
    summary: str
    aggregate: Callable[[AdapterState, Means, OptimizerStep], Aggregate]
    kept: frozenset[Kept] = frozenset()
    messages: Callable[[AdapterRound], Traffic] = trained_factors
    frozen: Callable[[int], Frozen | None] = lambda turn: None
    method: str | None = None
    mixed_ranks: bool = False
    optimizers: bool = False
    personal: bool = False
    restarts: bool = False

    def means(self) -> Means:
        """Return means that hold no client yet."""
        return Means(self.kept)
