"""Tests of global models, for the recipe and for the annealing's feedback (docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from rayfed_lora.annealing.stages import Feedback, proposed_rank
from rayfed_lora.data.prompts import Answer
from rayfed_lora.federation import evaluation, generation, sampling, transitions
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.run import Run
from rayfed_lora.federation.selection import Selection
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.engine import Engine, IndexArray, Population, Running, Task
from rayfed_lora.tasks.messages import Evaluate, Generate, TestClients
from rayfed_lora.types import ClientScore, GlobalModel, Predictions, RoundPlan, Split

_Evaluation = Running[tuple[Predictions, ...]]
# Prompts that are answered in one batch.
_ANSWERED_TOGETHER = 16
_ClientTest = Running[tuple[ClientScore, ...]]


@dataclass(frozen=True)
class TestResults:
    """The scores of the model after a round.

    Attributes:
        test: on the test split, where that was due.
        validation: on the validation split, where annealing or selection uses it.
        clients: on clients' own examples, where that was due.
        own: of the same clients with their own factors, where they have some.
        answers: to prompts of the test split, where that was due.
    """

    test: Scores | None
    validation: Scores | None
    clients: Sequence[ClientScore] = ()
    own: Sequence[ClientScore] = ()
    answers: Sequence[Answer] = ()


@dataclass(frozen=True)
class RunningTests:
    """The tests of one round that were started; None: not due.

    `metrics` are computed beside the built-in ones; `round` is counted from 0.
    """

    test: _Evaluation | None
    validation: _Evaluation | None
    clients: _ClientTest | None
    own: _ClientTest | None
    answers: Running[tuple[Answer, ...]] | None = None
    metrics: Sequence[str] = ()
    round: int = 0

    def result(self) -> TestResults:
        """Wait for all tests; raises RunError where an own metric fails."""
        answers = () if self.answers is None else self.answers.result()
        test = self._scores(self.test)
        if answers:
            test = {**(test or {}), **generation.scores(answers)}
        return TestResults(
            test,
            self._scores(self.validation),
            () if self.clients is None else self.clients.result(),
            () if self.own is None else self.own.result(),
            answers,
        )

    def _scores(self, running: _Evaluation | None) -> Scores | None:
        if running is None:
            return None
        return evaluation.scores(running.result(), self.metrics, self.round)


def answering(
    recipe: Recipe, engine: Engine, population: Population, model: GlobalModel
) -> Running[tuple[Answer, ...]]:
    """Start the answers of a model to the prompts of `evaluation.generate`."""
    facts = population.prompts
    if facts is None:
        raise ValueError("need prompts, evaluation.generate has none")
    size = min(recipe.evaluation.batch_size, _ANSWERED_TOGETHER)
    task: Task[tuple[Answer, ...]] = cast(
        Any, Generate(model, "test", evaluation.shards(facts.count, size))
    )
    return engine.submit(task)


class Tester:
    """Has an engine test global models."""

    def __init__(
        self, recipe: Recipe, engine: Engine, population: Population, limits: IndexArray | None
    ) -> None:
        """Test on an opened engine; `limits`: largest rank of each client, if any is limited."""
        self._recipe = recipe
        self._engine = engine
        self._population = population
        self._limits = limits

    def start(self, run: Run) -> RunningTests:
        """Start the tests that are due after a round; `run` is the run after it."""
        settings, annealing = self._recipe.evaluation, self._recipe.annealing
        last = run.rounds == annealing.total_rounds
        every = settings.clients_every
        clients_due = last or (every is not None and run.rounds % every == 0)
        clients, own = None, None
        if settings.client_fraction > 0.0 and clients_due:
            clients, own = self._start_on_clients(run)
        due = last or run.rounds % settings.every == 0
        watched = annealing.feedback == "metric" or (due and bool(settings.watched))
        asked = settings.generate
        asking = asked is not None and (
            last or (asked.every is not None and run.rounds % asked.every == 0)
        )
        due = due or asking
        return RunningTests(
            test=self._evaluation("test", run.model) if due else None,
            validation=self._evaluation("validation", run.model) if watched else None,
            clients=clients,
            own=own,
            answers=answering(self._recipe, self._engine, self._population, run.model)
            if asking
            else None,
            metrics=settings.metrics,
            round=run.rounds - 1,
        )

    def _start_on_clients(self, run: Run) -> tuple[_ClientTest, _ClientTest | None]:
        """Start the tests on clients' own examples, with the global model and with their own."""
        clients = sampling.tested_clients(self._recipe, self._population.clients, run.rounds - 1)
        shared = self._engine.submit(TestClients(run.model, tuple(clients)))
        kept = [tuple(k for k in block if k in run.personal) for block in clients]
        blocks = tuple(block for block in kept if block)
        if not blocks:
            return shared, None
        tested = [client for block in blocks for client in block]
        limits = {} if self._limits is None else {k: int(self._limits[k]) for k in tested}
        return shared, self._engine.submit(TestClients(run.model, blocks, limits, run.personal))

    def _evaluation(self, split: Split, model: GlobalModel) -> _Evaluation:
        rows, size = self._population.examples[split], self._recipe.evaluation.batch_size
        return self._engine.submit(Evaluate(model, split, evaluation.shards(rows, size)))

    def _energy(self, model: GlobalModel) -> float | None:
        return evaluation.scores(self._evaluation("validation", model).result())["loss"]

    def feedback(self, t: int, run: Run) -> Feedback:
        """Return the feedback for the plan of round `t`, with the energies that a proposal needs.

        `run` is the run before that round.
        """
        annealing = self._recipe.annealing
        feedback = Feedback(rank=run.rank, best_at_heating=run.best_at_heating)
        if annealing.feedback == "metric" and run.validation is not None:
            return replace(feedback, metric=run.validation[annealing.target.metric])
        proposed = proposed_rank(annealing, t, run.rank)
        if annealing.feedback != "energies" or proposed is None:
            return feedback
        model, shape = run.model, self._population.shape
        ranks = transitions.allocate(self._recipe, shape, model.state, t, proposed)
        smaller = transitions.resized_adapter(self._recipe, model.state, ranks, t)
        return replace(
            feedback,
            energy_current=self._energy(model),
            energy_proposed=self._energy(replace(model, state=smaller)),
            draw=float(generator(self._recipe.seed, Purpose.ACCEPTANCE, t).random()),
        )

    def selection(self, run: Run, new: Run, tested: TestResults) -> Selection:
        """Return the selection after a round; `run` is the run before it, `new` that after it.

        Rounds without a test do not count: annealing may validate these too, but a run ends with a
        tested round, and the scores of the exported model are known.
        """
        settings = self._recipe.evaluation
        if not settings.watched or tested.test is None:
            return run.selection
        return run.selection.after(settings, new.rounds - 1, new.model, tested.validation)

    def best_at_heating(self, run: Run, plan: RoundPlan, validation: Scores | None) -> float | None:
        """Return the best validation metric reached at the heating rank so far.

        `run` is the run before a round, `validation` its scores if the annealing uses them.
        """
        target, best = self._recipe.annealing.target, run.best_at_heating
        rank = self._recipe.annealing.heating.rank
        early = plan.stage in ("initiating", "heating")
        if validation is None or plan.trainable == "full" or plan.rank != rank or not early:
            return best
        metric = validation[target.metric]
        better = max if target.metric == "accuracy" else min
        if metric is None or best is None:
            return best if metric is None else metric
        return better(best, metric)
