"""SA-FedLoRA's server: the round loop.

For each round: plan (annealing), draw the cohort, resize the global state, let the executor train
it, aggregate, book the bytes, test, record, save.

Source: arXiv:2405.09394 v1 for the stages; FedAvg's loop, arXiv:1602.05629.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

from threadpoolctl import threadpool_limits

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.step import Aggregate, WeightedState
from rayfed_lora.annealing.stages import Feedback, is_full, plan_round, proposed_rank
from rayfed_lora.errors import InterruptedRunError, RunError
from rayfed_lora.federation import evaluation, sampling, transitions
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.executor import Executor, Population
from rayfed_lora.federation.learning_rate import learning_rate
from rayfed_lora.federation.ledger import BYTES_A_VALUE, Bill, Ledger
from rayfed_lora.federation.transitions import Entry, GlobalModel
from rayfed_lora.lora.counting import dense_params, factor_params
from rayfed_lora.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientRecord,
    ClientUpdate,
    LocalPlan,
    RoundPlan,
    RoundRecord,
    Split,
    Trainable,
)


class Observer(Protocol):
    """Who wants to know how the run goes."""

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        """Note that a round begins."""
        ...

    def client_done(self, update: ClientUpdate) -> None:
        """Note that a client's update was taken in."""
        ...

    def round_done(self, record: RoundRecord, clients: list[ClientRecord]) -> None:
        """Note a finished round."""
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
    """

    rounds: int
    model: GlobalModel
    rank: int | None = None
    validation: Scores | None = None
    best_at_heating: float | None = None
    timing: Timing = field(default_factory=Timing)


class Server:
    """Runs the rounds of one recipe on an executor. Knows nothing of files or of Ray."""

    def __init__(
        self,
        recipe: Recipe,
        executor: Executor,
        population: Population,
        observer: Observer,
        should_stop: Callable[[], bool],
    ) -> None:
        """Prepare the run.

        Args:
            recipe: the run.
            executor: opened.
            population: what its `open` said.
            observer: told of every round and client.
            should_stop: asked between clients; once true, the round is abandoned.
        """
        self._recipe = recipe
        self._executor = executor
        self._population = population
        self._observer = observer
        self._should_stop = should_stop
        self.ledger = Ledger(population.shape, population.clients)

    def fresh(self) -> Progress:
        """Return the run before its first round."""
        trainable: Trainable = "full" if is_full(self._recipe.annealing, 0) else "adapter"
        dense = self._executor.initial_tensors(trainable)
        return Progress(0, GlobalModel(AdapterState({}, dense), Base(), trainable))

    def rounds(self, progress: Progress) -> Iterator[Progress]:
        """Run the rounds that are left; yield the run after each of them.

        Raises:
            InterruptedRunError: `should_stop` said so; the last yielded progress is whole.
            ClientError: a client's training raised.
            RunError: no client of a round sent a usable update.
        """
        # One BLAS thread: a result must not depend on how many cores a machine has.
        with threadpool_limits(limits=1, user_api="blas"):
            for t in range(progress.rounds, self._recipe.annealing.total_rounds):
                progress = self._round(t, progress)
                yield progress

    def _round(self, t: int, before: Progress) -> Progress:
        began = time.perf_counter()
        recipe, shape = self._recipe, self._population.shape
        plan = plan_round(recipe.annealing, t, self._feedback(t, before))
        cohort = sampling.cohort(recipe, self._population.clients, t)
        self._observer.round_started(plan, cohort)
        entry = transitions.enter(recipe, shape, before.model, plan)
        aggregate, updates = self._train(entry, plan, cohort)
        trained = time.perf_counter()
        bill = self._book(plan, entry, cohort, updates)
        model = replace(entry.model, state=aggregate.state)
        tested, validation = self._test(t, model)
        ended = time.perf_counter()
        timing = replace(
            before.timing,
            training_s=before.timing.training_s + trained - began,
            evaluation_s=before.timing.evaluation_s + ended - trained,
            client_updates=before.timing.client_updates + bill.arrived,
        )
        record = self._record(plan, entry, aggregate, updates, bill)
        record = replace(
            record,
            eval_accuracy=None if tested is None else tested.accuracy,
            eval_loss=None if tested is None else tested.loss,
            validation_accuracy=None if validation is None else validation.accuracy,
            validation_loss=None if validation is None else validation.loss,
            seconds=ended - began,
        )
        self._observer.round_done(record, _client_records(t, updates, bill))
        after = Progress(t + 1, model, before.rank, validation, before.best_at_heating, timing)
        return after if plan.trainable == "full" else self._noted(after, plan)

    def _feedback(self, t: int, before: Progress) -> Feedback:
        """Return what the schedule may look at, computing the energies that a proposal needs."""
        annealing = self._recipe.annealing
        feedback = Feedback(rank=before.rank, best_at_heating=before.best_at_heating)
        if annealing.acceptance == "target" and before.validation is not None:
            return replace(feedback, metric=getattr(before.validation, annealing.target.metric))
        proposed = proposed_rank(annealing, t, before.rank)
        if annealing.acceptance != "metropolis" or proposed is None:
            return feedback
        model, shape = before.model, self._population.shape
        ranks = transitions.allocate(self._recipe, shape, model.state, t, proposed)
        smaller = transitions.resized(self._recipe, model.state, ranks, t)
        return replace(
            feedback,
            energy_current=self._evaluate("validation", model).loss,
            energy_proposed=self._evaluate("validation", replace(model, state=smaller)).loss,
            draw=float(generator(self._recipe.seed, Purpose.ACCEPTANCE, t).random()),
        )

    def _noted(self, after: Progress, plan: RoundPlan) -> Progress:
        """Note the rank in use, and the best validation metric reached at the heating rank."""
        target, scores = self._recipe.annealing.target, after.validation
        best = after.best_at_heating
        rank = self._recipe.annealing.heating.rank
        if scores is not None and plan.rank == rank and plan.stage in ("initiating", "heating"):
            metric = getattr(scores, target.metric)
            better = max if target.metric == "accuracy" else min
            best = metric if best is None else better(best, metric)
        return replace(after, rank=plan.rank, best_at_heating=best)

    def _train(
        self, entry: Entry, plan: RoundPlan, cohort: tuple[int, ...]
    ) -> tuple[Aggregate, list[ClientUpdate]]:
        """Train the cohort and aggregate its updates as they come, in client order."""
        recipe = self._recipe
        blocks = sampling.blocks(cohort, recipe.runtime.cohort_size)
        local = LocalPlan(
            plan.round, plan.trainable, learning_rate(recipe, plan.round), plan.proximal_weight
        )
        model = entry.model
        updates = self._executor.train(model.state, model.base, local, blocks)
        taken: list[ClientUpdate] = []
        arrived = self._take_in(updates, taken)
        first = next(arrived, None)
        if first is None:
            reasons = sorted({str(update.error) for update in taken})
            raise RunError(
                f"round {plan.round}: none of {len(cohort)} clients sent a usable update;"
                f" {'; '.join(reasons[:3])}"
            )
        aggregation = recipe.aggregation
        rule = RULES[aggregation.rule].aggregate
        lr = aggregation.server_optimizer.lr
        return rule(model.state, chain([first], arrived), lr), taken

    def _take_in(
        self, updates: Iterator[ClientUpdate], taken: list[ClientUpdate]
    ) -> Iterator[WeightedState]:
        """Yield (examples, state) of usable updates; keep of each what the record needs."""
        for update in updates:
            if self._should_stop():
                raise InterruptedRunError("stopped; the round was abandoned")
            self._observer.client_done(update)
            taken.append(replace(update, state=None))
            if update.state is not None:
                yield float(update.examples), update.state

    def _book(
        self, plan: RoundPlan, entry: Entry, cohort: tuple[int, ...], updates: list[ClientUpdate]
    ) -> Bill:
        if entry.folded_params:
            self.ledger.fold_base(entry.folded_params)
        bill = self.ledger.book(
            plan.trainable,
            entry.ranks,
            cohort,
            sum(update.error is None for update in updates),
            down_ranks=entry.cut,
            after_initiating=plan.stage != "initiating",
        )
        if plan.trainable == "full":
            self.ledger.replace_base()
        return bill

    def _test(self, t: int, model: GlobalModel) -> tuple[Scores | None, Scores | None]:
        """Return the test scores, and those that the annealing feedback needs."""
        last = t + 1 == self._recipe.annealing.total_rounds
        due = last or (t + 1) % self._recipe.evaluation.every == 0
        watched = self._recipe.annealing.acceptance == "target"
        return (
            self._evaluate("test", model) if due else None,
            self._evaluate("validation", model) if watched else None,
        )

    def _evaluate(self, split: Split, model: GlobalModel) -> Scores:
        shards = evaluation.shards(
            self._population.examples[split], self._recipe.evaluation.batch_size
        )
        sums = self._executor.evaluate(split, shards, model.state, model.base, model.trainable)
        return evaluation.scores(sums)

    def _record(
        self,
        plan: RoundPlan,
        entry: Entry,
        aggregate: Aggregate,
        updates: list[ClientUpdate],
        bill: Bill,
    ) -> RoundRecord:
        """Return the round's row, scores and seconds still to be filled in."""
        usable = [update for update in updates if update.error is None]
        examples = sum(update.examples for update in usable)
        ranks = dict(entry.ranks) if plan.trainable == "adapter" else None
        state = entry.model.state
        return RoundRecord(
            round=plan.round,
            stage=plan.stage,
            rank=None if ranks is None else math.fsum(ranks.values()) / len(ranks),
            ranks=ranks,
            trainable_params=factor_params(state) + dense_params(state),
            proximal_weight=plan.proximal_weight,
            clients=len(updates),
            failed_clients=len(updates) - len(usable),
            train_loss=math.fsum(u.train_loss * u.examples for u in usable) / examples,
            eval_accuracy=None,
            eval_loss=None,
            validation_accuracy=None,
            validation_loss=None,
            aggregation_error=aggregate.error,
            params_up=bill.params_up,
            params_down=bill.params_down,
            bytes_up=bill.params_up * BYTES_A_VALUE,
            bytes_down=bill.params_down * BYTES_A_VALUE,
            bytes_base=bill.base_params * BYTES_A_VALUE,
            learning_rate=learning_rate(self._recipe, plan.round),
            proposal=plan.proposal,
            seconds=0.0,
        )


def _client_records(t: int, updates: list[ClientUpdate], bill: Bill) -> list[ClientRecord]:
    return [
        ClientRecord(
            round=t,
            client=update.client,
            examples=update.examples,
            train_loss=None if update.error is not None else update.train_loss,
            status="ok" if update.error is None else "failed",
            error=update.error,
            bytes_up=0 if update.error is not None else bill.up_params * BYTES_A_VALUE,
            bytes_down=bill.down_params * BYTES_A_VALUE,
            seconds=update.seconds,
        )
        for update in updates
    ]
