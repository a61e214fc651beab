"""Tests of global models: those that a recipe asks for, and those that the annealing looks at.

Source: this project; the annealing's feedback as in docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayfed_lora.annealing.stages import Feedback, proposed_rank
from rayfed_lora.federation import evaluation, records, sampling, transitions
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.executor import (
    Call,
    Executor,
    IndexArray,
    Pending,
    Population,
)
from rayfed_lora.federation.progress import Progress
from rayfed_lora.federation.transitions import GlobalModel
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import ClientTest, RoundPlan, Split

_Wait = Pending[Scores]


@dataclass(frozen=True)
class RoundTests:
    """The tests of one round that were started; each waits for its result.

    Attributes:
        test: on the test split, where it is due.
        validation: on the validation split, where the annealing looks at it.
        on_clients: on clients' own examples.
    """

    test: _Wait | None
    validation: _Wait | None
    on_clients: Pending[list[ClientTest]]

    def done(self) -> bool:
        """Return whether all results are there, as far as is known."""
        tests = (self.test, self.validation, self.on_clients)
        return all(test is None or test.done() for test in tests)


class Tester:
    """Has an executor test global models."""

    def __init__(
        self,
        recipe: Recipe,
        executor: Executor,
        population: Population,
        limits: IndexArray | None,
    ) -> None:
        """Keep what decides which tests are due.

        Args:
            recipe: the run.
            executor: opened.
            population: what its `open` said.
            limits: largest rank of each client, where any is limited.
        """
        self._recipe = recipe
        self._executor = executor
        self._population = population
        self._limits = limits

    def started(self, after: Progress, before: int = 0) -> RoundTests:
        """Start the tests that are due after a round.

        Args:
            after: the run after it, without its scores.
            before: the first round whose training may not be begun before them.
        """
        last = after.rounds == self._recipe.annealing.total_rounds
        due = last or after.rounds % self._recipe.evaluation.every == 0
        watched = self._recipe.annealing.feedback == "target"
        return RoundTests(
            test=self._evaluation("test", after.model, before) if due else None,
            validation=self._evaluation("validation", after.model, before) if watched else None,
            on_clients=self._on_clients(after, before),
        )

    def _on_clients(self, after: Progress, before: int) -> Pending[list[ClientTest]]:
        """Start the tests on clients' own examples that are due after a round."""
        settings, t = self._recipe.evaluation, after.rounds - 1
        last = after.rounds == self._recipe.annealing.total_rounds
        every = settings.clients_every
        if settings.client_fraction == 0.0 or not (
            last or (every is not None and after.rounds % every == 0)
        ):
            return Pending(list, lambda: True)
        blocks = sampling.tested_clients(self._recipe, self._population.clients, t)
        model, kept = after.model, after.personal
        calls = [Call((block,)) for block in blocks]
        model_parts = model.state, model.base, model.trainable
        wait = self._executor.test_clients(calls, *model_parts, before)
        own = [
            Call.of((block,), self._limits, kept)
            for block in blocks
            if any(client in kept for client in block)
        ]
        wait_own = self._executor.test_clients(own, *model_parts, before)

        def tests() -> list[ClientTest]:
            scores = {s.client: s for s in wait_own() if s.client in kept}
            return [records.client_test(t, score, scores.get(score.client)) for score in wait()]

        return Pending(tests, lambda: wait.done() and wait_own.done())

    def _evaluation(self, split: Split, model: GlobalModel, before: int = 0) -> _Wait:
        rows, size = self._population.examples[split], self._recipe.evaluation.batch_size
        shards, base = evaluation.shards(rows, size), model.base
        wait = self._executor.evaluate(split, shards, model.state, base, model.trainable, before)
        return wait.then(evaluation.scores)

    def feedback(self, t: int, before: Progress) -> Feedback:
        """Return what the schedule may look at, computing the energies that a proposal needs.

        Args:
            t: the round that is to be planned.
            before: the run before it.
        """
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
            energy_current=self._evaluation("validation", model)().loss,
            energy_proposed=self._evaluation("validation", replace(model, state=smaller))().loss,
            draw=float(generator(self._recipe.seed, Purpose.ACCEPTANCE, t).random()),
        )

    def noted(self, after: Progress, plan: RoundPlan) -> Progress:
        """Note the best validation metric reached at the heating rank.

        Args:
            after: the run after a round, with its scores.
            plan: that round.
        """
        target, scores = self._recipe.annealing.target, after.validation
        rank = self._recipe.annealing.heating.rank
        if scores is None or plan.rank != rank or plan.stage not in ("initiating", "heating"):
            return after
        metric, best = getattr(scores, target.metric), after.best_at_heating
        better = max if target.metric == "accuracy" else min
        return replace(after, best_at_heating=metric if best is None else better(best, metric))
