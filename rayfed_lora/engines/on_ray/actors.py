"""What runs inside Ray's worker processes. Plain classes, so that tests build them without Ray.

Source: this project.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import ray
from threadpoolctl import threadpool_limits

from rayfed_lora.engines.factory import Factory, population, prepared
from rayfed_lora.engines.on_ray.messages import Message, packed, unpacked
from rayfed_lora.engines.threads import TrainerThreads
from rayfed_lora.engines.waiting import LAST
from rayfed_lora.federation.calls import Starts, Training, joined
from rayfed_lora.federation.executor import Call, Population
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training import python_lock
from rayfed_lora.types import (
    AdapterState,
    LocalPlan,
    Predictions,
    Split,
    Trainable,
)

if TYPE_CHECKING:
    from rayfed_lora.data.workload import Workload
    from rayfed_lora.training.protocol import Trainer
    from rayfed_lora.training.trainer import Weights


_T = TypeVar("_T")
# What is trained, and what a server may still have tested (`PATIENCE`).
_STATES_KEPT = 4


def calls_at_once(trainers: int) -> int:
    """Return how many calls of an actor Ray begins.

    For each trainer one that computes, one that comes or goes meanwhile, and two tests that others
    may pass.
    """
    return 4 * trainers


class NotOpenError(Exception):
    """The actor's process is a new one: Ray has restarted it while it had nothing to do."""


@dataclass(frozen=True)
class Timed(Generic[_T]):
    """What a call has come to, and how long the actor worked on it."""

    value: _T
    seconds: float


class TrainTask(NamedTuple):
    """What a call of `train` is to do.

    Attributes:
        call: the clients.
        plan: the round.
        number: of the state that they start from, the same for the same one.
        means_apart: whether the means of their updates are to stay in the store.
    """

    call: Call
    plan: LocalPlan
    number: int
    means_apart: bool


class EvaluateTask(NamedTuple):
    """What a call of `evaluate` is to do: which rows of which split.

    Attributes:
        split: whose rows.
        rows: which.
        trainable: `full` or `adapter`.
        number: as of a `TrainTask`.
        before: the first round that may not be trained before it.
    """

    split: Split
    rows: slice
    trainable: Trainable
    number: int
    before: int = 0


class TestTask(NamedTuple):
    """What a call of `test_clients` is to do; the rest as of an `EvaluateTask`."""

    call: Call
    trainable: Trainable
    number: int
    before: int = 0


class ClientActor:
    """Trainers on a CPU or GPU share; serve many virtual clients, keep nothing between calls."""

    # As of the server: Ray asks for it even where the actor could not be made.
    _name = "client-actor"

    def __init__(self, gpus: float, name: str, trainers: int = 1) -> None:
        """Keep who it is; the trainers are made by `open`, also after a restart.

        Args:
            gpus: this actor's GPU share.
            name: readable name; the dashboard reads it once.
            trainers: how many blocks it trains at once.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._gpus = gpus
        self._name = name
        self._rule = ""
        self._trainers = trainers
        # They compute, always the same (torch keeps its settings by thread), while Ray's own fetch
        # what the next calls need and send what the last ones have found.
        self._threads: TrainerThreads | None = None
        # The states that came last, by number: several only where they are small.
        self._received: dict[int, AdapterState] = {}
        self._receiving = Lock()

    def __repr__(self) -> str:
        return self._name

    def prepare(self, recipe: Recipe, factory: Factory) -> tuple[None, Workload, Weights]:
        """Read the data and the base, for all actors: they go to the object store.

        Args:
            recipe: the run.
            factory: makes data and weights.

        Returns:
            A first result that tells of success without fetching the others, and the two.
        """
        return prepared(recipe, factory)

    def open(self, recipe: Recipe, factory: Factory, prepared: list[ray.ObjectRef]) -> Population:
        """Build the trainers of a run and say what they serve; any others are let go.

        Args:
            recipe: the run.
            factory: makes the trainers.
            prepared: references of workload and weights, in a list so that Ray does not wait for
                them: meanwhile this actor imports what it needs.
        """
        if self._threads is not None:
            # A process that is stuck and about to be ended must not pass for the one after it.
            self._threads.close(wait=True)
        factory.load(recipe)
        device = "cpu"
        if self._gpus > 0:
            from rayfed_lora.training.device import device_of_share

            device = device_of_share(self._gpus)
        workload, weights = ray.get(prepared)
        # As in the server: sums must not depend on how many cores an actor has.
        threadpool_limits(limits=1, user_api="blas")
        self._threads, self._received = None, {}
        self._rule = recipe.aggregation.rule
        each = range(self._trainers)
        trainers = [factory.trainer(recipe, workload, weights, device) for _ in each]
        self._threads = TrainerThreads(trainers)
        return population(workload, trainers[0], device)

    def _opened(self) -> TrainerThreads:
        if self._threads is None:
            raise NotOpenError(f"{self._name} was restarted while it was idle")
        return self._threads

    def initial_tensors(self, trainable: Trainable) -> Message:
        """Return the dense tensors that the first round starts from."""
        return packed(self._computed(lambda trainer: trainer.initial_tensors(trainable)))

    def _state(self, number: int, message: Message) -> AdapterState:
        """Return a state: the same object while states of the same number come."""
        with self._receiving:
            if number not in self._received:
                others = [*self._received.items()] if isinstance(message, bytes) else []
                self._received = {**dict(others[-_STATES_KEPT + 1 :]), number: unpacked(message)}
            return self._received[number]

    def train(self, task: Message, state: Message, base: Message) -> Message | tuple[Message, ...]:
        """Train some clients.

        Args:
            task: `TrainTask`.
            state: the global state.
            base: what is frozen.

        Returns:
            `Timed`, of the clients' reports and the means of their updates; of the reports only
            where the means are to stay here, which then come second.
        """
        threads = self._opened()
        if not threads.idle:
            # What others compute comes first; this draws batches, ahead of its turn.
            python_lock.wait()
        what: TrainTask = unpacked(task)
        start = self._state(what.number, state)
        training = Training(what.call, start, unpacked(base), what.plan, self._rule)
        training.draw(threads.trainers[0])
        done = self._timed(training.train, round_=what.plan.round)
        reports, means = threads.beside(training.reduced).result()
        if what.means_apart:
            return packed(Timed((reports, None), done.seconds)), packed(means)
        return packed(Timed((reports, means), done.seconds))

    def join(self, *parts: Message) -> Message:
        """Join means of consecutive clients, in order."""
        means = [unpacked(part) for part in parts]
        return packed(self._opened().beside(joined, means, self._rule).result())

    def evaluate(self, task: Message, state: Message, base: Message) -> Message:
        """Return the predictions on some rows of a split, `Timed`.

        Args:
            task: `EvaluateTask`.
            state: the global state.
            base: what is frozen.
        """
        what: EvaluateTask = unpacked(task)
        frozen = unpacked(base)

        def evaluated(trainer: Trainer) -> Predictions:
            shown = self._state(what.number, state)
            return trainer.evaluate(what.split, what.rows, shown, frozen, what.trainable)

        return packed(self._timed(evaluated, before=what.before))

    def test_clients(self, task: Message, state: Message, base: Message) -> Message:
        """Test clients on their own examples, as the `TestTask` says; else as `evaluate`."""
        what: TestTask = unpacked(task)
        call, frozen = what.call, unpacked(base)
        starts = Starts(self._state(what.number, state), call)
        states = [starts.of(client) for client in call.clients]
        return packed(
            self._timed(
                lambda trainer: trainer.test_clients(call.clients, states, frozen, what.trainable),
                before=what.before,
            )
        )

    def export(self, trainable: Trainable, state: Message, base: Message) -> Message:
        """Return the files of the trained model."""
        model = unpacked(state), unpacked(base)
        return packed(self._computed(lambda trainer: trainer.export(*model, trainable)))

    def _computed(
        self, work: Callable[[Trainer], _T], *, round_: int = LAST, before: int = 0
    ) -> _T:
        """Do something in a thread that computes, in its turn."""
        (found,) = self._opened().submit(work, round_=round_, before=before)
        return found.result()

    def _timed(
        self, work: Callable[[Trainer], _T], *, round_: int = LAST, before: int = 0
    ) -> Timed[_T]:
        def timed(trainer: Trainer) -> Timed[_T]:
            began = time.perf_counter()
            value = work(trainer)
            return Timed(value, time.perf_counter() - began)

        return self._computed(timed, round_=round_, before=before)
