"""SA-FedLoRA's server: the round loop.

Source: arXiv:2405.09394 v1 for the stages; FedAvg's loop, arXiv:1602.05629.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from threadpoolctl import threadpool_limits

from rayfed_lora.annealing.stages import plan_round
from rayfed_lora.federation.client_training import ClientTraining
from rayfed_lora.federation.cohorts import Cohorts, new_ledger
from rayfed_lora.federation.model_tests import Tester
from rayfed_lora.federation.privacy import Accountant
from rayfed_lora.federation.records import Round
from rayfed_lora.federation.run import Run, after, aggregate, remembered, with_memory
from rayfed_lora.federation.transitions import enter
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Engine, Population
from rayfed_lora.types import ClientReport, RoundPlan


class Recorder(Protocol):
    """Is told of a run's progress."""

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        """Note that a round begins."""
        ...

    def clients_done(self, reports: Sequence[ClientReport]) -> None:
        """Note that clients' updates were taken in."""
        ...

    def round_done(self, finished: Round) -> None:
        """Note a finished round."""
        ...


class Server:
    """Runs the rounds of one recipe on an engine. Knows nothing of files or of Ray."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        population: Population,
        recorder: Recorder,
        should_stop: Callable[[], bool],
    ) -> None:
        """Prepare a run on an opened engine, whose `open` returned the population.

        While clients train, `should_stop` is asked; once true, the round is abandoned.
        """
        self._recipe = recipe
        self._shape = population.shape
        self._engine = engine
        self._recorder = recorder
        self._clients = population.clients
        self.ledger = new_ledger(recipe, population.shape, population.clients)
        self._cohorts = Cohorts(recipe, population.devices, population.clients, self.ledger)
        limits, tell = self._cohorts.limits, recorder.clients_done
        self.clients = ClientTraining(recipe, population, limits, should_stop, tell)
        self._accountant = Accountant(recipe, population.clients)
        self._tester = Tester(recipe, engine, population, limits)

    def rounds(self, run: Run) -> Iterator[Run]:
        """Run the rounds that are left; yield the run after each of them.

        Raises:
            InterruptedRunError: `should_stop` said so; the last yielded run is whole.
            ClientError: more clients raised than may.
            RunError: no client of a round sent a usable update.
        """
        recipe = self._recipe
        # One BLAS thread: a result must not depend on how many cores a machine has.
        with threadpool_limits(limits=1, user_api="blas"):
            began = time.perf_counter()
            for t in range(run.rounds, recipe.annealing.total_rounds):
                if run.selection.stopped_by is not None:
                    return
                plan = plan_round(recipe.annealing, t, self._tester.feedback(t, run))
                start = enter(recipe, self._shape, run.model, plan)
                cohort = self._cohorts.draw(plan, start.resizing, run.clock_s, run.history)
                self._recorder.round_started(plan, cohort.clients)
                local = self.clients.local_plan(plan, cohort)
                known = remembered(recipe, run, start, cohort)
                task = self.clients.task(local, start, cohort, run.personal, known)
                training = self._engine.submit(task)
                updates = self.clients.collect(training, cohort, t)
                step = aggregate(recipe, run, start, updates, cohort)
                new = after(run, plan, start, cohort, updates, step)
                new = with_memory(new, known, start, local, updates, self._clients)
                trained = time.perf_counter()
                tests = self._tester.start(new)
                error = step.result.measure()
                tested = tests.result()
                # Last: what is booked is yielded.
                bill = self.ledger.book(cohort.messages(updates.usable))
                now = time.perf_counter()
                run = replace(
                    new,
                    validation=tested.validation,
                    best_at_heating=self._tester.best_at_heating(run, plan, tested.validation),
                    selection=self._tester.selection(run, new, tested),
                    timing=run.timing.plus(trained - began, now - trained, bill.arrived),
                )
                seconds = now - began
                done = Round(
                    *(plan, local, start, cohort, updates, step, bill, error, tested, seconds),
                    epsilon=self._accountant.epsilon(t + 1),
                    training_s=trained - began,
                )
                self._recorder.round_done(done)
                began = now
                # None of it stays in memory while the next round is trained.
                del start, cohort, known, task, training, updates, step, new, tests, tested, done
                yield run
