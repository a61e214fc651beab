"""The messages of a round: the facts that decide them, and their sizes under a rule.

Source: docs/method.md, "Aggregation rules" (sent up / down) and "The communication ledger".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.messages import AdapterRound, Counts, Traffic
from rayfed_lora.aggregation.rule import Rule
from rayfed_lora.federation.transitions import Resizing
from rayfed_lora.objectives.objective import Objective
from rayfed_lora.types import Frozen, ModelShape, Trainable

Mask = npt.NDArray[np.bool_]
_NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Sent:
    """The shares of a round's messages that were sent, by the simulated clock.

    Attributes:
        absent: (cohort,) whether the client left or came too late.
        down, up: (cohort,) share of the client's download and upload that was sent.
    """

    absent: Mask
    down: npt.NDArray[np.float64]
    up: npt.NDArray[np.float64]


@dataclass(frozen=True)
class RoundFacts:
    """The facts that decide the messages of a round.

    Attributes:
        cohort: client ids.
        arrived: (cohort,) whether the client's update arrived.
        limits: (cohort,) largest rank of each client; None: no limits.
        frozen: the factor that is not trained.
        stepped: whether the server's learning rate is not 1: a residual then has one more term,
            the start.
        sent: shares of the messages of clients that left or came too late; None: every message is
            sent whole.
    """

    trainable: Trainable
    cohort: Sequence[int]
    arrived: Mask
    resizing: Resizing = field(default_factory=Resizing)
    limits: Counts | None = None
    frozen: Frozen | None = None
    stepped: bool = False
    after_initiating: bool = True
    sent: Sent | None = None


def traffic(shape: ModelShape, rule: Rule, facts: RoundFacts) -> Traffic:
    """Return the messages of a round: every weight both ways, or the rule's of an adapter round."""
    if facts.trainable == "full":
        whole = np.full(len(facts.cohort), shape.total_params, np.int64)
        return Traffic(whole, whole)
    resizing = facts.resizing
    limits = np.full(len(facts.cohort), _NO_LIMIT) if facts.limits is None else facts.limits
    return rule.messages(
        AdapterRound(
            modules=shape.modules,
            head=shape.head_params,
            ranks=resizing.ranks,
            received=resizing.ranks if resizing.cut is None else resizing.cut,
            limits=limits,
            arrived=facts.arrived,
            frozen=facts.frozen,
            stepped=facts.stepped,
        )
    )


def trained_values(shape: ModelShape, facts: RoundFacts) -> int:
    """Return the number of values that a client of a round trains, at the round's ranks."""
    if facts.trainable == "full":
        return shape.total_params
    sides = {
        name: module.d_in * (facts.frozen != "a") + module.d_out * (facts.frozen != "b")
        for name, module in shape.modules.items()
    }
    return shape.head_params + sum(sides[n] * rank for n, rank in facts.resizing.ranks.items())


def with_objective(
    messages: Traffic, objective: Objective, shape: ModelShape, facts: RoundFacts
) -> Traffic:
    """Return the messages with what the clients' objective sends beside them, up and down."""
    trained = trained_values(shape, facts)
    up, down = (objective.values(part, trained) for part in ("message", "shared"))
    return replace(messages, up=messages.up + up, down=messages.down + down)
