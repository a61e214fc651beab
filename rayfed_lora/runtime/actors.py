"""What runs inside Ray's worker processes. Plain classes, so that tests build them without Ray.

Source: this project.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import ray
from threadpoolctl import threadpool_limits

from rayfed_lora.aggregation.means import Means
from rayfed_lora.federation.executor import Call, Population, Starts, Training, joined
from rayfed_lora.recipe import Recipe
from rayfed_lora.runtime.factory import Factory, population, prepared
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientScore,
    ClientUpdate,
    FloatArray,
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


# Calls of an actor that Ray begins: one computes, the other comes or goes meanwhile.
CALLS_AT_ONCE = 2


class NotOpenError(Exception):
    """The actor's process is a new one: Ray has restarted it while it had nothing to do."""


@dataclass(frozen=True)
class Timed(Generic[_T]):
    """What a call has come to, and how long the actor worked on it."""

    value: _T
    seconds: float


class ClientActor:
    """A trainer on a CPU or GPU share; serves many virtual clients, keeps nothing between calls."""

    # As of the server: Ray asks for it even where the actor could not be made.
    _name = "client-actor"

    def __init__(self, gpus: float, name: str) -> None:
        """Keep who it is; the trainer is made by `open`, also after a restart.

        Args:
            gpus: this actor's GPU share.
            name: readable name; the dashboard reads it once.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._gpus = gpus
        self._name = name
        self._rule = ""
        self._trainer: Trainer | None = None
        # The state that was tested last, and its number.
        self._tested: tuple[int, AdapterState] | None = None
        # One thread computes, always the same (torch keeps its settings by thread), while Ray's
        # own fetch what the next call needs and send what the last one has found.
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="computing")
        # Another one sums up what a call has come to, while the next one is computed.
        self._summing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="summing")

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
        """Build the trainer of a run and say what it serves; any other is let go.

        Args:
            recipe: the run.
            factory: makes the trainer.
            prepared: references of workload and weights, in a list so that Ray does not wait for
                them: meanwhile this actor imports what it needs.
        """
        return self._computed(lambda: self._open(recipe, factory, prepared))

    def _open(self, recipe: Recipe, factory: Factory, prepared: list[ray.ObjectRef]) -> Population:
        factory.load(recipe)
        device = "cpu"
        if self._gpus > 0:
            from rayfed_lora.training.device import device_of_share

            device = device_of_share(self._gpus)
        workload, weights = ray.get(prepared)
        # As in the server: sums must not depend on how many cores an actor has.
        threadpool_limits(limits=1, user_api="blas")
        # Some libraries keep the limit by thread.
        self._summing.submit(threadpool_limits, 1, "blas").result()
        self._trainer, self._tested = None, None
        self._rule = recipe.aggregation.rule
        self._trainer = factory.trainer(recipe, workload, weights, device)
        return population(workload, self._trainer, device)

    def _opened(self) -> Trainer:
        if self._trainer is None:
            raise NotOpenError(f"{self._name} was restarted while it was idle")
        return self._trainer

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        return self._computed(lambda: self._opened().initial_tensors(trainable))

    def train(
        self, call: Call, state: AdapterState, base: Base, plan: LocalPlan
    ) -> tuple[Timed[tuple[ClientUpdate, ...]], Means]:
        """Train some clients; arrays from the object store are read-only.

        Returns:
            The clients' reports, and the means of their updates, which stay in the store.
        """
        training = Training(self._opened(), call, state, base, plan, self._rule)
        done = self._timed(training.train)
        reports, means = self._summing.submit(training.reduced).result()
        return Timed(reports, done.seconds), means

    def join(self, *parts: Means) -> Means:
        """Join means of consecutive clients, in order."""
        return self._summing.submit(joined, parts, self._rule).result()

    def evaluate(
        self,
        split: Split,
        rows: slice,
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        number: int,
    ) -> Timed[Predictions]:
        """Return the predictions on some rows of a split.

        Args:
            split: which split.
            rows: of the split.
            state: the global state: a new object in each call.
            base: what is frozen.
            trainable: `full` or `adapter`.
            number: of the state, the same for the same one.
        """

        def evaluated() -> Predictions:
            trainer = self._opened()
            if self._tested is None or self._tested[0] != number:
                self._tested = number, state
            return trainer.evaluate(split, rows, self._tested[1], base, trainable)

        return self._timed(evaluated)

    def test_clients(
        self, call: Call, state: AdapterState, base: Base, trainable: Trainable
    ) -> Timed[list[ClientScore]]:
        """Test clients on their own examples."""
        starts = Starts(state, call)
        states = [starts.of(client) for client in call.clients]
        return self._timed(
            lambda: self._opened().test_clients(call.clients, states, base, trainable)
        )

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        return self._computed(lambda: self._opened().export(state, base, trainable))

    def _computed(self, work: Callable[[], _T]) -> _T:
        """Do something in the thread that computes, in its turn."""
        return self._computing.submit(work).result()

    def _timed(self, work: Callable[[], _T]) -> Timed[_T]:
        def timed() -> Timed[_T]:
            began = time.perf_counter()
            value = work()
            return Timed(value, time.perf_counter() - began)

        return self._computed(timed)
