"""SA-FedLoRA's server: the round loop.

For each round: plan (annealing), draw the cohort, resize the global state, let the executor train
it, aggregate, book the bytes, test, record, save.

Source: arXiv:2405.09394 v1 for the stages; FedAvg's loop, arXiv:1602.05629.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate
from rayfed_lora.annealing.stages import (
    Feedback,
    adapter_rounds_before,
    is_full,
    plan_round,
    proposed_rank,
)
from rayfed_lora.errors import ClientError, InterruptedRunError, RunError
from rayfed_lora.federation import evaluation, records, sampling, transitions
from rayfed_lora.federation.devices import Devices, Turnout
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.executor import Call, Executor, Population, Trained
from rayfed_lora.federation.learning_rate import learning_rate
from rayfed_lora.federation.ledger import Bill, Ledger
from rayfed_lora.federation.progress import (
    Observer,
    Progress,
    Timing,
    kept_moments,
    personal_factors,
)
from rayfed_lora.federation.sampling import Block, BlockSize
from rayfed_lora.federation.traffic import RoundFacts, is_cut
from rayfed_lora.federation.transitions import Entry, GlobalModel
from rayfed_lora.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientRecord,
    ClientTest,
    ClientUpdate,
    Frozen,
    LocalPlan,
    RoundPlan,
    RoundRecord,
    Split,
    Trainable,
)

_Wait = Callable[[], Scores]


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
    training: Iterator[Trained]


@dataclass(frozen=True)
class _Trained:
    """A round that is aggregated and being tested; `after` lacks scores and timing."""

    after: Progress
    plan: RoundPlan
    clients: list[ClientRecord]
    bill: Bill
    record: RoundRecord
    test: tuple[_Wait | None, _Wait | None]
    on_clients: Callable[[], list[ClientTest]]


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
        self._devices = Devices(recipe, population.devices) if recipe.simulates_time else None
        cohort = recipe.cohort_size(population.clients)
        # How many clients of an adapter round are trained together, and why.
        self.block_size = sampling.block_size(recipe, population.shape, cohort, population.device)
        self._timing = Timing()
        self._ended = 0.0

    def fresh(self) -> Progress:
        """Return the run before its first round."""
        trainable: Trainable = "full" if is_full(self._recipe.annealing, 0) else "adapter"
        dense = self._executor.initial_tensors(trainable)
        return Progress(0, GlobalModel(AdapterState({}, dense), Base(), trainable))

    def rounds(self, progress: Progress) -> Iterator[Progress]:
        """Run the rounds that are left; yield the run after each of them.

        Where no feedback needs it, a round is tested while the next one is being trained.

        Raises:
            InterruptedRunError: `should_stop` said so; the last yielded progress is whole.
            ClientError: more clients raised than may.
            RunError: no client of a round sent a usable update.
        """
        watched = self._recipe.annealing.feedback != "always"
        tested: _Trained | None = None
        # One BLAS thread: a result must not depend on how many cores a machine has.
        with threadpool_limits(limits=1, user_api="blas"):
            self._timing, self._ended = progress.timing, time.perf_counter()
            for t in range(progress.rounds, self._recipe.annealing.total_rounds):
                if tested is not None and watched:
                    yield (progress := self._finished(tested))
                    tested = None
                try:
                    started = self._started(t, progress if tested is None else tested.after)
                except RunError:
                    if tested is not None:
                        yield self._finished(tested)
                    raise
                if tested is not None:
                    yield self._finished(tested)
                tested = self._trained(started)
            if tested is not None:
                yield self._finished(tested)

    def _started(self, t: int, before: Progress) -> _Started:
        """Plan a round and let its training begin."""
        recipe, shape = self._recipe, self._population.shape
        plan = plan_round(recipe.annealing, t, self._feedback(t, before))
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
        calls = [self._call(run, before, full) for run in blocks]
        training = self._executor.train(entry.model.state, entry.model.base, local, calls)
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
        quote = self.ledger.quote(self._facts(plan, entry, frozen, before, cohort, all_there))
        turnout = self._devices.turnout(t, cohort, quote, plan.trainable == "full", now)
        return cohort, turnout, now + turnout.length_s

    def _call(self, blocks: tuple[Block, ...], before: Progress, full: bool) -> Call:
        """Return the call for some blocks, with what sets their clients apart."""
        call = Call(blocks)
        if full:
            return call
        limits = {} if self._limits is None else {k: int(self._limits[k]) for k in call.clients}
        own = {k: before.personal[k] for k in call.clients if k in before.personal}
        return replace(call, limits=limits, personal=own)

    def _trained(self, started: _Started) -> _Trained:
        """Take a round's updates in, aggregate them, and let the test of the result begin."""
        plan, entry = started.plan, started.entry
        self._observer.round_started(plan, started.cohort)
        before = started.before
        moments = kept_moments(before, entry)
        step = OptimizerStep(self._recipe.aggregation.server_optimizer, moments, started.frozen)
        aggregate, updates, retries = self._aggregated(started, step)
        bill = self._book(started, updates)
        base = transitions.merged(entry.model.base, aggregate.merged)
        model = replace(entry.model, state=aggregate.state, base=base)
        # What the next round needs of this one; the rest is known when it is tested.
        after = replace(
            before,
            rounds=plan.round + 1,
            clock_s=started.clock_s,
            model=model,
            rank=before.rank if plan.trainable == "full" else plan.rank,
            moments=step.moments,
            personal=personal_factors(before, updates),
        )
        lr, error = learning_rate(self._recipe, plan.round), aggregate.error
        record = replace(
            records.round_record(plan, entry, started.frozen, lr, error, updates, bill),
            retried_blocks=retries,
            simulated_s=None if self._devices is None else started.clock_s - before.clock_s,
        )
        test, on_clients = self._test(plan.round, model), self._client_test(after)
        rows = records.client_records(plan.round, updates, bill, started.turnout)
        return _Trained(after, plan, rows, bill, record, test, on_clients)

    def _finished(self, trained: _Trained) -> Progress:
        """Wait for a round's test, record the round, and return the run after it."""
        began = time.perf_counter()
        tested, validation = (None if wait is None else wait() for wait in trained.test)
        own_tests = trained.on_clients()
        now = time.perf_counter()
        seconds, self._ended = now - self._ended, now
        earlier = self._timing
        self._timing = replace(
            earlier,
            training_s=earlier.training_s + seconds - (now - began),
            evaluation_s=earlier.evaluation_s + now - began,
            client_updates=earlier.client_updates + trained.bill.arrived,
        )
        record = records.scored(trained.record, tested, validation, seconds)
        plan = trained.plan
        if own_tests:
            self._observer.clients_tested(own_tests)
        self._observer.round_done(record, trained.clients)
        after = replace(trained.after, validation=validation, timing=self._timing)
        return after if plan.trainable == "full" else self._noted(after, plan)

    def _feedback(self, t: int, before: Progress) -> Feedback:
        """Return what the schedule may look at, computing the energies that a proposal needs."""
        annealing = self._recipe.annealing
        feedback = Feedback(rank=before.rank, best_at_heating=before.best_at_heating)
        if annealing.feedback == "target" and before.validation is not None:
            return replace(feedback, metric=getattr(before.validation, annealing.target.metric))
        proposed = proposed_rank(annealing, t, before.rank)
        if annealing.feedback != "metropolis" or proposed is None:
            return feedback
        model, shape = before.model, self._population.shape
        ranks = transitions.allocate(self._recipe, shape, model.state, t, proposed)
        smaller = transitions.resized(self._recipe, model.state, ranks, t)
        return replace(
            feedback,
            energy_current=self._evaluate("validation", model)().loss,
            energy_proposed=self._evaluate("validation", replace(model, state=smaller))().loss,
            draw=float(generator(self._recipe.seed, Purpose.ACCEPTANCE, t).random()),
        )

    def _noted(self, after: Progress, plan: RoundPlan) -> Progress:
        """Note the best validation metric reached at the heating rank."""
        target, scores = self._recipe.annealing.target, after.validation
        rank = self._recipe.annealing.heating.rank
        if scores is None or plan.rank != rank or plan.stage not in ("initiating", "heating"):
            return after
        metric, best = getattr(scores, target.metric), after.best_at_heating
        better = max if target.metric == "accuracy" else min
        return replace(after, best_at_heating=metric if best is None else better(best, metric))

    def _aggregated(
        self, started: _Started, step: OptimizerStep
    ) -> tuple[Aggregate, list[ClientUpdate], int]:
        """Take in a round's updates as they come.

        Returns:
            Their aggregate (without any, the state as it was), a report of each client of the
            cohort, and how often a block was trained again.
        """
        whole = self._rule.means()
        reports: list[ClientUpdate] = []
        spent = 0.0
        retries = 0
        for part in started.training:
            if self._should_stop():
                raise InterruptedRunError("stopped; the round was abandoned")
            retries += part.retries
            for report in map(self._sized, part.clients):
                reports.append(report)
                self._observer.client_done(report)
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
        aggregate = self._rule.rule(state, whole, step) if reports else Aggregate(state, None, {})
        self._observer.aggregated(spent + time.perf_counter() - began)
        return aggregate, self._with_absent(started, reports), retries

    def _with_absent(self, started: _Started, reports: list[ClientUpdate]) -> list[ClientUpdate]:
        """Return the reports of a cohort, with those of who left or came too late."""
        if started.turnout is None:
            return reports
        found = {report.client: report for report in reports}
        for client, absence in started.turnout.absences.items():
            size = int(self._population.devices.sizes[client])
            absent = ClientUpdate(client, size, None, float("nan"), 0.0, absent=absence)
            self._observer.client_done(absent)
            found[client] = absent
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

    def _book(self, started: _Started, updates: list[ClientUpdate]) -> Bill:
        arrived = np.array([update.usable for update in updates])
        facts = self._facts(
            started.plan, started.entry, started.frozen, started.before, started.cohort, arrived
        )
        turnout = started.turnout
        return self.ledger.book(facts if turnout is None else replace(facts, sent=turnout.sent))

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

    def _test(self, t: int, model: GlobalModel) -> tuple[_Wait | None, _Wait | None]:
        """Start the test, and the evaluation that the annealing feedback needs."""
        last = t + 1 == self._recipe.annealing.total_rounds
        due = last or (t + 1) % self._recipe.evaluation.every == 0
        watched = self._recipe.annealing.feedback == "target"
        return (
            self._evaluate("test", model) if due else None,
            self._evaluate("validation", model) if watched else None,
        )

    def _client_test(self, after: Progress) -> Callable[[], list[ClientTest]]:
        """Start the tests on clients' own examples that are due after a round."""
        settings, t = self._recipe.evaluation, after.rounds - 1
        last = after.rounds == self._recipe.annealing.total_rounds
        every = settings.clients_every
        if settings.client_fraction == 0.0 or not (
            last or (every is not None and after.rounds % every == 0)
        ):
            return list
        tested = sampling.tested_clients(self._recipe, self._population.clients, t)
        calls = [Call((block,)) for block in tested]
        model, full = after.model, after.model.trainable == "full"
        wait = self._executor.test_clients(calls, model.state, model.base, model.trainable)
        own = [
            self._call(call.blocks, after, full)
            for call in calls
            if any(client in after.personal for client in call.clients)
        ]
        wait_own = self._executor.test_clients(own, model.state, model.base, model.trainable)

        def tests() -> list[ClientTest]:
            scores = {s.client: s for s in wait_own() if s.client in after.personal}
            return [records.client_test(t, score, scores.get(score.client)) for score in wait()]

        return tests

    def _evaluate(self, split: Split, model: GlobalModel) -> _Wait:
        shards = evaluation.shards(
            self._population.examples[split], self._recipe.evaluation.batch_size
        )
        state, base = model.state, model.base
        wait = self._executor.evaluate(split, shards, state, base, model.trainable)
        return lambda: evaluation.scores(wait())
