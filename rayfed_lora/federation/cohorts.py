"""The cohort of a round, the time of its end, and its messages, for a run and for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.annealing.stages import adapter_rounds_before
from rayfed_lora.federation import sampling
from rayfed_lora.federation.encoding import Encoding
from rayfed_lora.federation.ledger import Ledger
from rayfed_lora.federation.sampling import ClientHistory
from rayfed_lora.federation.simulated_clock import SimulatedClock, Turnout
from rayfed_lora.federation.traffic import RoundFacts
from rayfed_lora.federation.transitions import Resizing
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import DeviceFacts, ModelShape, RoundPlan


@dataclass(frozen=True)
class Cohort:
    """The clients of a round, in rising order.

    Attributes:
        turnout: None where no time is simulated.
        clock_s: simulated time at the end of the round.
        history: what the sampler knew of all clients; None where it needs nothing.
        lasted_s: simulated length of the round, waiting for clients included; None where no time
            is simulated.
        expected: number of clients that a round draws on average.
        facts: of the messages if every client that neither leaves nor is late sends its update.
    """

    clients: tuple[int, ...]
    turnout: Turnout | None
    clock_s: float
    lasted_s: float | None
    facts: RoundFacts
    history: ClientHistory | None = None
    expected: int = 0

    @property
    def present(self) -> tuple[int, ...]:
        """The clients that stay, and arrive in time."""
        absent = {} if self.turnout is None else self.turnout.absences
        return tuple(client for client in self.clients if client not in absent)

    def messages(self, arrived: Sequence[bool]) -> RoundFacts:
        """Return the facts of the messages, given whether each client's update arrived."""
        return replace(self.facts, arrived=np.array(arrived, bool))


def new_ledger(recipe: Recipe, shape: ModelShape, clients: int) -> Ledger:
    """Return the ledger of a run before its first round."""
    rule, wire = RULES[recipe.aggregation.rule], recipe.wire
    up, down = wire.up.named.method(), wire.down.named.method()
    lossless = up.lossless and down.lossless
    encoding = None if lossless else Encoding(shape, up, down, own_b=rule.personal)
    objective = OBJECTIVES[recipe.clients.objective.name]
    given = recipe.model.adapter is not None
    return Ledger(shape, clients, rule, objective, encoding, given=given)


class Cohorts:
    """Draws cohorts, and times them where the recipe simulates time."""

    def __init__(self, recipe: Recipe, devices: DeviceFacts, clients: int, ledger: Ledger) -> None:
        """Draw each client's device; the ledger gives the sizes of a round's messages."""
        self._recipe = recipe
        self._ledger = ledger
        self._clients, self._expected = clients, recipe.cohort_size(clients)
        self._rule = RULES[recipe.aggregation.rule]
        self._unknown = ClientHistory.empty(devices.sizes)
        self._clock = SimulatedClock(recipe, devices) if recipe.simulates_time else None
        # Largest rank of each client, None where none is limited.
        self.limits: npt.NDArray[np.int64] | None = sampling.rank_limits(recipe, self._clients)

    def draw(
        self,
        plan: RoundPlan,
        resizing: Resizing,
        clock_s: float,
        history: ClientHistory | None = None,
    ) -> Cohort:
        """Return the cohort of a round; the run began `clock_s` simulated seconds before it.

        A sampler sees `history`; None: that of a run that has not begun.

        Raises:
            RunError: no client can be reached any more.
        """
        t = plan.round
        history = history or self._unknown
        if self._clock is None:
            clients = sampling.cohort(self._recipe, history, t)
            facts = self._facts(plan, resizing, clients)
            return Cohort(clients, None, clock_s, None, facts, self._kept(history), self._expected)
        clients, began_s = self._clock.cohort(t, clock_s, history)
        facts = self._facts(plan, resizing, clients)
        bill, full = self._ledger.quote(facts), plan.trainable == "full"
        turnout = self._clock.turnout(t, clients, bill, full, began_s)
        facts = replace(facts, arrived=~turnout.sent.absent, sent=turnout.sent)
        end_s = began_s + turnout.length_s
        return Cohort(
            clients, turnout, end_s, end_s - clock_s, facts, self._kept(history), self._expected
        )

    def _kept(self, history: ClientHistory) -> ClientHistory | None:
        return None if self._recipe.clients.sampler.name == "uniform" else history

    def _facts(self, plan: RoundPlan, resizing: Resizing, clients: tuple[int, ...]) -> RoundFacts:
        turn = adapter_rounds_before(self._recipe.annealing, plan.round)
        return RoundFacts(
            trainable=plan.trainable,
            cohort=clients,
            arrived=np.ones(len(clients), bool),
            resizing=resizing,
            limits=None if self.limits is None else self.limits[list(clients)],
            frozen=None if plan.trainable == "full" else self._rule.frozen(turn),
            stepped=self._recipe.aggregation.server_optimizer.lr != 1.0,
            after_initiating=plan.stage != "initiating",
        )
