"""SA-FedLoRA's server: the round loop.

For each round: plan (annealing), draw the cohort, resize the global state, let the executor train
it, aggregate, test, book the bytes, record, save.

Source: arXiv:2405.09394 v1 for the stages; FedAvg's loop, arXiv:1602.05629.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate
from rayfed_lora.annealing.stages import (
    adapter_rounds_before,
    is_full,
    plan_round,
)
from rayfed_lora.errors import ClientError, InterruptedRunError, RayfedError, RunError
from rayfed_lora.federation import records, sampling, transitions
from rayfed_lora.federation.devices import Devices, Turnout
from rayfed_lora.federation.executor import Call, Executor, Population, Trained
from rayfed_lora.federation.learning_rate import learning_rate
from rayfed_lora.federation.ledger import Ledger
from rayfed_lora.federation.progress import (
    Observer,
    Progress,
    Timing,
    kept_moments,
    personal_factors,
)
from rayfed_lora.federation.sampling import BlockSize
from rayfed_lora.federation.testing import RoundTests, Tester
from rayfed_lora.federation.traffic import RoundFacts, is_cut
from rayfed_lora.federation.transitions import Entry, GlobalModel
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    Frozen,
    LocalPlan,
    RoundPlan,
    RoundRecord,
    Trainable,
)

# Seconds that a round may take to train for others to be trained before it is tested.
_SHORT_S = 1.0


@dataclass(frozen=True)
class _Started:
    """A round whose clients are being trained; `clock_s` is the simulated time of its end."""

    before: Progress
    plan: RoundPlan
    cohort: tuple[int, ...]
    entry: Entry
    frozen: Frozen | None
    turnout: Turnout | None
    clock_s: float
    training: Generator[Trained, None, None]


@dataclass(frozen=True)
class _Trained:
    """A round that is aggregated.

    Attributes:
        plan: the round.
        after: the run after it, without scores and timing.
        record: its row, without what was sent, the aggregate's error, scores and seconds.
        error: computes the aggregate's error; holds the model that the round started from.
        updates: a report of each client of the cohort.
        turnout: by the simulated clock.
        training_s: seconds since the round before it was aggregated, without waiting for tests.
        aggregation_s: seconds that the server took to turn the updates into the next state.
    """

    plan: RoundPlan
    after: Progress
    record: RoundRecord
    error: Callable[[], float | None]
    updates: list[ClientUpdate]
    turnout: Turnout | None
    training_s: float
    aggregation_s: float


@dataclass(frozen=True)
class _Tested:
    """An aggregated round that is being tested; nothing of the model that it started from.

    Attributes:
        trained: the round.
        tests: its tests.
        patience: how many rounds' training may be begun before them, beside the first one.
    """

    trained: _Trained
    tests: RoundTests
    patience: int


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
        self._rule = RULES[recipe.aggregation.rule]
        self.ledger = Ledger(population.shape, population.clients, self._rule)
        self._limits = sampling.rank_limits(recipe, population.clients)
        self._tester = Tester(recipe, executor, population, self._limits)
        self._devices = Devices(recipe, population.devices) if recipe.simulates_time else None
        cohort = recipe.cohort_size(population.clients)
        # How many clients of an adapter round are trained together, and why.
        self.block_size = sampling.block_size(recipe, population.shape, cohort, population.device)
        self._timing = Timing()
        # `time.perf_counter()` at which the newest round was aggregated, later by the seconds that
        # were spent waiting for tests since.
        self._aggregated_at = 0.0
        # Of aggregated rounds that are not finished yet, in order.
        self._unbooked: deque[RoundFacts] = deque()

    def fresh(self) -> Progress:
        """Return the run before its first round."""
        trainable: Trainable = "full" if is_full(self._recipe.annealing, 0) else "adapter"
        dense = self._executor.initial_tensors(trainable)
        return Progress(0, GlobalModel(AdapterState({}, dense), Base(), trainable))

    def rounds(self, progress: Progress) -> Iterator[Progress]:
        """Run the rounds that are left; yield the run after each of them.

        Where no feedback needs it, and the executor can, a round is tested behind the training of
        the next one: by whoever is done with that first, and while the server aggregates. It is
        over when the training of the one after that has begun; of short rounds some more may be
        trained first, so that there is always something to do for who would wait.

        Raises:
            InterruptedRunError: `should_stop` said so; the last yielded progress is whole.
            ClientError: more clients raised than may.
            RunError: no client of a round sent a usable update.
        """
        beside = self._executor.concurrent and self._recipe.annealing.feedback == "always"
        # The newest aggregated round, and those before it that are still being tested.
        trained: _Trained | None = None
        tested: deque[_Tested] = deque()
        # One BLAS thread: a result must not depend on how many cores a machine has.
        with threadpool_limits(limits=1, user_api="blas"):
            self._timing, self._aggregated_at = progress.timing, time.perf_counter()
            for t in range(progress.rounds, self._recipe.annealing.total_rounds):
                if trained is not None and not beside:
                    yield (progress := self._finished(self._in_test(trained)))
                    trained = None
                try:
                    started = self._started(t, progress if trained is None else trained.after)
                except RunError:
                    yield from self._rescued(tested, trained)
                    raise
                if trained is not None:
                    tested.append(self._in_test(trained, self._patience(trained)))
                    trained = None
                    while tested and (
                        tested[0].tests.done() or len(tested) > 1 + tested[0].patience
                    ):
                        yield self._finished(tested.popleft())
                try:
                    trained = self._trained(started)
                except (RunError, InterruptedRunError):
                    yield from self._rescued(tested, None)
                    raise
            yield from self._last(tested, trained)

    def _patience(self, trained: _Trained) -> int:
        """Return how many rounds more may be trained before a round is tested.

        A run that is killed has to train again what is not finished, and what is to be tested is
        kept: only small models, and rounds that cost little to train again.
        """
        short = trained.plan.trainable == "adapter" and trained.training_s < _SHORT_S
        return self._executor.patience if short else 0

    def _last(self, tested: Iterable[_Tested], trained: _Trained | None) -> Iterator[Progress]:
        """Finish the rounds that are left."""
        newest = [] if trained is None else [self._in_test(trained)]
        for each in (*tested, *newest):
            yield self._finished(each)

    def _rescued(self, tested: Iterable[_Tested], trained: _Trained | None) -> Iterator[Progress]:
        """Finish the rounds that are left, as far as that goes, where a later one has not ended."""
        with suppress(RayfedError):
            yield from self._last(tested, trained)

    def _in_test(self, trained: _Trained, patience: int = 0) -> _Tested:
        """Let the test of a round begin, and compute what nobody had to wait for."""
        # The training of the next round has begun.
        tests = self._tester.started(trained.after, trained.after.rounds + 1 + patience)
        record = replace(trained.record, aggregation_error=trained.error())
        # Without what the error is computed from.
        return _Tested(replace(trained, record=record, error=lambda: None), tests, patience)

    def _started(self, t: int, before: Progress) -> _Started:
        """Plan a round and let its training begin."""
        recipe, shape = self._recipe, self._population.shape
        plan = plan_round(recipe.annealing, t, self._tester.feedback(t, before))
        entry = transitions.enter(recipe, shape, before.model, plan)
        full = plan.trainable == "full"
        frozen = None if full else self._rule.frozen(adapter_rounds_before(recipe.annealing, t))
        cohort, turnout, clock_s = self._drawn(plan, entry, frozen, before)
        lr = learning_rate(recipe, t)
        tolerant = recipe.most_failed(len(cohort)) > 0
        local = LocalPlan(t, plan.trainable, lr, plan.proximal_weight, frozen, tolerant)
        size = BlockSize(1, even=True) if full else self.block_size
        absent = {} if turnout is None else turnout.absences
        present = tuple(client for client in cohort if client not in absent)
        blocks = sampling.calls(sampling.blocks(present, size)) if present else []
        limits, personal = (None, {}) if full else (self._limits, before.personal)
        calls = [Call.of(run, limits, personal) for run in blocks]
        start = transitions.protected(entry.model.state)
        training = self._executor.train(start, entry.model.base, local, calls)
        return _Started(before, plan, cohort, entry, frozen, turnout, clock_s, training)

    def _drawn(
        self, plan: RoundPlan, entry: Entry, frozen: Frozen | None, before: Progress
    ) -> tuple[tuple[int, ...], Turnout | None, float]:
        """Return a round's cohort, what becomes of it, and the simulated time of the end."""
        t, now = plan.round, before.clock_s
        if self._devices is None:
            return sampling.cohort(self._recipe, self._population.clients, t), None, now
        cohort, now = self._devices.cohort(t, now)
        all_there = np.ones(len(cohort), bool)
        facts = self._facts(plan, entry, frozen, before, cohort, all_there)
        quote = self.ledger.quote(*self._unbooked, facts)
        turnout = self._devices.turnout(t, cohort, quote, plan.trainable == "full", now)
        return cohort, turnout, now + turnout.length_s

    def _trained(self, started: _Started) -> _Trained:
        """Take a round's updates in and aggregate them."""
        plan, entry, before = started.plan, started.entry, started.before
        self._observer.round_started(plan, started.cohort)
        moments = kept_moments(before, entry)
        step = OptimizerStep(self._recipe.aggregation.server_optimizer, moments, started.frozen)
        with closing(started.training):
            aggregate, updates, retries, aggregation_s = self._aggregated(started, step)
        base = transitions.merged(entry.model.base, aggregate.merged)
        # What the next round needs of this one; the rest is known when it is tested.
        after = replace(
            before,
            rounds=plan.round + 1,
            clock_s=started.clock_s,
            model=replace(entry.model, state=aggregate.state, base=base),
            rank=before.rank if plan.trainable == "full" else plan.rank,
            moments=step.moments,
            personal=personal_factors(before, updates),
        )
        arrived = np.array([update.usable for update in updates])
        facts = self._facts(plan, entry, started.frozen, before, started.cohort, arrived)
        if started.turnout is not None:
            facts = replace(facts, sent=started.turnout.sent)
        self._unbooked.append(facts)
        lr, lasted_s = learning_rate(self._recipe, plan.round), started.clock_s - before.clock_s
        record = replace(
            records.round_record(plan, entry, started.frozen, lr, updates),
            retried_blocks=retries,
            simulated_s=None if self._devices is None else lasted_s,
        )
        # `after` has copies of what clients keep; this is a part of messages.
        updates = [replace(u, personal=None) if u.personal else u for u in updates]
        now = time.perf_counter()
        training_s, self._aggregated_at = now - self._aggregated_at, now
        return _Trained(
            plan,
            after,
            record,
            aggregate.measure,
            updates,
            started.turnout,
            training_s,
            aggregation_s,
        )

    def _finished(self, tested: _Tested) -> Progress:
        """Wait for a round's test, book and record the round, and return the run after it."""
        trained, began = tested.trained, time.perf_counter()
        tests = tested.tests
        scores = None if tests.test is None else tests.test()
        validation = None if tests.validation is None else tests.validation()
        own_tests = tests.on_clients()
        waited_s = time.perf_counter() - began
        self._aggregated_at += waited_s
        # Only now: what is yielded has to be what the ledger has.
        bill = self.ledger.book(self._unbooked.popleft())
        earlier = self._timing
        self._timing = replace(
            earlier,
            training_s=earlier.training_s + trained.training_s,
            evaluation_s=earlier.evaluation_s + waited_s,
            client_updates=earlier.client_updates + bill.arrived,
        )
        if own_tests:
            self._observer.clients_tested(own_tests)
        plan, seconds = trained.plan, trained.training_s + waited_s
        self._observer.round_done(
            records.finished(trained.record, bill, scores, validation, seconds),
            records.client_records(plan.round, trained.updates, bill, trained.turnout),
            trained.aggregation_s,
        )
        after = replace(trained.after, validation=validation, timing=self._timing)
        return after if plan.trainable == "full" else self._tester.noted(after, plan)

    def _aggregated(
        self, started: _Started, step: OptimizerStep
    ) -> tuple[Aggregate, list[ClientUpdate], int, float]:
        """Take in a round's updates as they come.

        Returns:
            Their aggregate (without any, the state as it was), a report of each client of the
            cohort, how often a block was trained again, and the seconds that aggregating took.
        """
        whole = self._rule.means()
        reports: list[ClientUpdate] = []
        spent = 0.0
        retries = 0
        for part in started.training:
            if self._should_stop():
                raise InterruptedRunError("stopped; the round was abandoned")
            retries += part.retries
            new = [self._sized(report) for report in part.clients]
            self._observer.clients_done(new)
            for report in new:
                reports.append(report)
                if report.trace is not None:
                    self._check_failed(started, reports)
            if part.means is not None:
                began = time.perf_counter()
                whole.join(part.means)
                spent += time.perf_counter() - began
        if reports and not any(report.usable for report in reports):
            reasons = sorted({str(report.error) for report in reports})
            raise RunError(
                f"round {started.plan.round}: none of {len(reports)} clients sent a usable update;"
                f" {'; '.join(reasons[:3])}"
            )
        state = started.entry.model.state
        began = time.perf_counter()
        aggregate = (
            self._rule.rule(state, whole, step) if reports else Aggregate(state, {}, lambda: None)
        )
        spent += time.perf_counter() - began
        return aggregate, self._with_absent(started, reports), retries, spent

    def _with_absent(self, started: _Started, reports: list[ClientUpdate]) -> list[ClientUpdate]:
        """Return the reports of a cohort, with those of who left or came too late."""
        if started.turnout is None:
            return reports
        sizes = self._population.devices.sizes
        absent = [
            ClientUpdate(client, int(sizes[client]), None, float("nan"), 0.0, absent=absence)
            for client, absence in started.turnout.absences.items()
        ]
        self._observer.clients_done(absent)
        found = {report.client: report for report in (*reports, *absent)}
        return [found[client] for client in started.cohort]

    def _sized(self, report: ClientUpdate) -> ClientUpdate:
        """Return a report with the number of examples, which who raised could not say."""
        if report.trace is None:
            return report
        return replace(report, examples=int(self._population.devices.sizes[report.client]))

    def _check_failed(self, started: _Started, reports: list[ClientUpdate]) -> None:
        """End the run where more clients of a round raised than may."""
        raised = [report for report in reports if report.trace is not None]
        most = self._recipe.most_failed(len(started.cohort))
        if len(raised) > most:
            last = raised[-1]
            why = f"{len(raised)} clients of the round failed, clients.max_failed allows {most}"
            raise ClientError(last.client, started.plan.round, f"{last.trace}\n{why}")

    def _facts(
        self,
        plan: RoundPlan,
        entry: Entry,
        frozen: Frozen | None,
        before: Progress,
        cohort: tuple[int, ...],
        arrived: npt.NDArray[np.bool_],
    ) -> RoundFacts:
        """Return what decides the messages of a round."""
        factors = before.model.state.factors
        return RoundFacts(
            trainable=plan.trainable,
            cohort=cohort,
            arrived=arrived,
            ranks=entry.ranks,
            limits=None if self._limits is None else self._limits[list(cohort)],
            frozen=frozen,
            ranks_before=entry.cut,
            folded=entry.folded_params,
            resized=is_cut({name: f.rank for name, f in factors.items()}, entry.ranks),
            stepped=self._recipe.aggregation.server_optimizer.lr != 1.0,
            after_initiating=plan.stage != "initiating",
        )
