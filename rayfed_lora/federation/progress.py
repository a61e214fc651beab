"""A run between two rounds, and who is told how it goes. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rayfed_lora.aggregation.server_step import Moments
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.transitions import Entry, GlobalModel
from rayfed_lora.types import (
    ClientRecord,
    ClientTest,
    ClientUpdate,
    Factors,
    FloatArray,
    RoundPlan,
    RoundRecord,
)


class Observer(Protocol):
    """Who wants to know how the run goes."""

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        """Note that a round begins."""
        ...

    def clients_done(self, updates: Sequence[ClientUpdate]) -> None:
        """Note that clients' updates were taken in."""
        ...

    def clients_tested(self, tests: list[ClientTest]) -> None:
        """Note how the model of a round does on clients' own examples, before the round is done."""
        ...

    def round_done(
        self, record: RoundRecord, clients: list[ClientRecord], aggregation_s: float
    ) -> None:
        """Note a finished round; another one may have been started and trained since.

        Args:
            record: its row.
            clients: the rows of its clients.
            aggregation_s: seconds that the server took to turn its updates into the next state.
        """
        ...


@dataclass(frozen=True)
class Timing:
    """Seconds spent, over all sittings of a run."""

    startup_s: float = 0.0
    training_s: float = 0.0
    evaluation_s: float = 0.0
    wall_s: float = 0.0
    client_updates: int = 0


@dataclass(frozen=True)
class Progress:
    """The run between two rounds: all that a checkpoint has to keep, beside the ledger.

    Attributes:
        rounds: number of finished rounds.
        model: the global model.
        rank: uniform rank in use, None before the first adapter round.
        validation: newest scores on the validation split, where feedback needs them.
        best_at_heating: best validation metric at the heating rank (target acceptance).
        timing: seconds so far.
        clock_s: simulated seconds so far.
        moments: of the server's optimiser.
        personal: B by module, of each client that keeps its own.
    """

    rounds: int
    model: GlobalModel
    rank: int | None = None
    validation: Scores | None = None
    best_at_heating: float | None = None
    timing: Timing = field(default_factory=Timing)
    clock_s: float = 0.0
    moments: Moments = field(default_factory=dict)
    personal: Mapping[int, Mapping[str, FloatArray]] = field(default_factory=dict)


def kept_moments(before: Progress, entry: Entry) -> Moments:
    """Return the moments of tensors that are still what they were when those were taken."""
    old, new = before.model, entry.model
    if old.trainable != new.trainable:
        return {}
    if not before.moments or _equal(new.state.factors, old.state.factors):
        return before.moments
    return {name: m for name, m in before.moments.items() if name in new.state.dense}


def _equal(new: Mapping[str, Factors], old: Mapping[str, Factors]) -> bool:
    """Return whether factors have the same values, whether or not they are the same objects."""
    if new is old:
        return True
    return new.keys() == old.keys() and all(
        f.scale == g.scale and np.array_equal(f.a, g.a) and np.array_equal(f.b, g.b)
        for f, g in ((f, old[name]) for name, f in new.items())
    )


def personal_factors(
    before: Progress, updates: list[ClientUpdate]
) -> Mapping[int, Mapping[str, FloatArray]]:
    """Return each client's own B after a round."""
    # Copies: what came is part of a message that would live as long as any of its clients' B.
    new = {
        update.client: {name: b.copy() for name, b in update.personal.items()}
        for update in updates
        if update.personal is not None
    }
    return {**before.personal, **new} if new else before.personal
