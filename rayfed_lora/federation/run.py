"""A run between two rounds, as a value: what a checkpoint holds beside the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.server_step import Moments, OptimizerStep
from rayfed_lora.aggregation.step import Aggregate
from rayfed_lora.annealing.stages import is_full
from rayfed_lora.federation.client_training import Updates
from rayfed_lora.federation.cohorts import Cohort
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.privacy import noised
from rayfed_lora.federation.sampling import ClientHistory
from rayfed_lora.federation.selection import Selection
from rayfed_lora.federation.transitions import Start, started, with_updates
from rayfed_lora.objectives.objective import Arrays, trained_shapes
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.objectives.remembered import Memory, Remembered
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Engine, Population
from rayfed_lora.tasks.messages import Initial, Personal
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientReport,
    GlobalModel,
    LocalPlan,
    RoundPlan,
    Trainable,
)


@dataclass(frozen=True)
class Timing:
    """Seconds spent and client updates used, over all processes that worked on a run."""

    startup_s: float = 0.0
    training_s: float = 0.0
    evaluation_s: float = 0.0
    wall_s: float = 0.0
    client_updates: int = 0

    def plus(self, training_s: float, evaluation_s: float, client_updates: int) -> Timing:
        """Return the timing after one more round."""
        return replace(
            self,
            training_s=self.training_s + training_s,
            evaluation_s=self.evaluation_s + evaluation_s,
            client_updates=self.client_updates + client_updates,
        )


@dataclass(frozen=True)
class Run:
    """A run between two rounds.

    Attributes:
        rounds: number of finished rounds.
        rank: uniform rank in use, None before the first adapter round.
        validation: newest scores on the validation split, where feedback needs them.
        best_at_heating: best validation metric at the heating rank (target acceptance).
        clock_s: simulated seconds so far.
        moments: of the server's optimiser.
        personal: B by module, of each client that keeps its own.
        history: what samplers know of clients; None where the sampler needs none.
        memory: of the clients' objective, by client that has taken part.
        shared: of the server, for the objective; empty before the first round.
        selection: the best model so far, and what ends the run.
    """

    rounds: int
    model: GlobalModel
    rank: int | None = None
    validation: Scores | None = None
    best_at_heating: float | None = None
    timing: Timing = field(default_factory=Timing)
    clock_s: float = 0.0
    moments: Moments = field(default_factory=dict)
    personal: Personal = field(default_factory=dict)
    history: ClientHistory | None = None
    memory: Memory = field(default_factory=dict)
    shared: Arrays = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)

    @property
    def result(self) -> GlobalModel:
        """The model that is exported: the best one where it is kept, else the last one."""
        return self.model if self.selection.kept is None else self.selection.kept.model


def fresh(recipe: Recipe, engine: Engine, population: Population) -> Run:
    """Return a run before its first round, from an opened engine."""
    trainable: Trainable = "full" if is_full(recipe.annealing, 0) else "adapter"
    dense = engine.submit(Initial(trainable)).result()
    if population.start is not None:
        return Run(0, started(recipe, population.shape, dense, population.start))
    return Run(0, GlobalModel(AdapterState({}, dense), Base(), trainable))


def remembered(recipe: Recipe, run: Run, start: Start, cohort: Cohort) -> Remembered:
    """Return the objective of a round with what clients and server remember of earlier ones.

    `run` is the run before the round. Adapter rounds that follow full-model rounds begin anew.
    """
    chosen, same = recipe.clients.objective, run.model.trainable == start.model.trainable
    objective = OBJECTIVES[chosen.name]
    shared = run.shared if same else {}
    if not shared:
        shared = objective.zeros("shared", trained_shapes(start.model.state, cohort.facts.frozen))
    return Remembered(chosen.name, chosen.options, run.memory if same else {}, shared)


@dataclass(frozen=True)
class Aggregated:
    """The server's step of a round, and the moments of its optimiser after it.

    `seconds` are those of joining the updates and of the step.
    """

    result: Aggregate
    moments: Moments
    seconds: float


def aggregate(
    recipe: Recipe, run: Run, start: Start, updates: Updates, cohort: Cohort
) -> Aggregated:
    """Turn the updates of a round into the next global state; without updates it is unchanged.

    `run` is the run before the round.
    """
    began = time.perf_counter()
    moments = kept_moments(run, start)
    step = OptimizerStep(recipe.aggregation.server_optimizer, moments, cohort.facts.frozen)
    state = start.model.state
    if updates.means is None and recipe.privacy is None:
        return Aggregated(Aggregate(state, {}, lambda: None), step.moments, 0.0)
    rule = RULES.with_options(recipe.aggregation.rule, recipe.aggregation.options)
    arrived, expected = sum(updates.usable), cohort.expected
    means = rule.means() if updates.means is None else updates.means
    means = noised(means, state, recipe, run.rounds, arrived, expected, cohort.facts.frozen)
    result = rule.aggregate(state, means, step)
    if updates.means is None:
        result = replace(result, measure=lambda: None)
    seconds = updates.joining_s + time.perf_counter() - began
    return Aggregated(result, step.moments, seconds)


def kept_moments(run: Run, start: Start) -> Moments:
    """Return the moments of the tensors that a round starts with as the last one left them."""
    if run.model.trainable != start.model.trainable:
        return {}
    if start.unchanged:
        return run.moments
    return {name: m for name, m in run.moments.items() if name in start.model.state.dense}


def after(
    run: Run, plan: RoundPlan, start: Start, cohort: Cohort, updates: Updates, step: Aggregated
) -> Run:
    """Return the run after a round, without its scores and timing; `run` is the run before it."""
    result = step.result
    base = with_updates(start.model.base, result.merged)
    return replace(
        run,
        rounds=plan.round + 1,
        model=replace(start.model, state=result.state, base=base),
        rank=run.rank if plan.trainable == "full" else plan.rank,
        clock_s=cohort.clock_s,
        moments=step.moments,
        personal=_personal(run.personal, updates.reports),
        history=cohort.history and cohort.history.after(plan.round, updates.reports),
    )


def with_memory(
    new: Run, known: Remembered, start: Start, local: LocalPlan, updates: Updates, clients: int
) -> Run:
    """Return the run after a round with what its objective remembers, and steps.

    Args:
        new: as of `after`.
        known: the objective, with what it remembered before the round.
        start: of the round.
        local: the round.
        updates: of its clients.
        clients: number of all clients of the run.
    """
    memory, shared = known.after_round(updates.reports, clients, local.round)
    if not known.objective.steps_model:
        return replace(new, memory=memory, shared=shared)
    arrived, mean = sum(updates.usable), new.model.state
    state, shared = known.model_after(start.model.state, mean, local, arrived, clients)
    return replace(new, memory=memory, shared=shared, model=replace(new.model, state=state))


def _personal(before: Personal, reports: Sequence[ClientReport]) -> Personal:
    """Return each client's own B after a round."""
    # Copies: a report's B is part of a message that would live as long as any of its clients' B.
    new = {
        report.client: {name: b.copy() for name, b in report.personal.items()}
        for report in reports
        if report.personal is not None
    }
    return {**before, **new} if new else before
