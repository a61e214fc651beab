"""What runs inside Ray's worker processes. Plain classes, so that tests build them without Ray.

Source: this project.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from threadpoolctl import threadpool_limits

from rayfed_lora.engines.factory import Factory, population, prepared
from rayfed_lora.engines.on_ray.messages import Message, packed, unpacked
from rayfed_lora.engines.threads import TrainerThreads
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Population, Reduces, Task

if TYPE_CHECKING:
    from rayfed_lora.data.workload import Workload
    from rayfed_lora.training.weights import Weights


def calls_at_once(trainers: int) -> int:
    """Return how many calls of an actor Ray begins.

    For each trainer one that computes, and one that comes or goes meanwhile.
    """
    return 2 * trainers


class NotOpenError(Exception):
    """The actor's process is a new one: Ray has restarted it while it had nothing to do."""


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
        self._trainers = trainers
        # They compute, always the same (torch keeps its settings by thread), while Ray's own fetch
        # what the next calls need and send what the last ones have found.
        self._threads: TrainerThreads | None = None

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
        self._threads = None
        each = range(self._trainers)
        trainers = [factory.trainer(recipe, workload, weights, device) for _ in each]
        self._threads = TrainerThreads(trainers)
        return population(workload, trainers[0], device)

    def run(
        self, task: Message, state: Message, base: Message, apart: bool, halvings: int = 0
    ) -> Message | tuple[Message, Message]:
        """Answer a task.

        Args:
            task: without its model.
            state: the global state; a pair of it and of what clients see of it, if that differs.
            base: what is frozen.
            apart: whether what is joined of the result is to stay in the object store, as a second
                result.
            halvings: how often to halve it, memory being short.

        Returns:
            A message of the seconds that it took and the result; where a part of the result is
            kept apart, its message follows.

        Raises:
            NotOpenError: the process is a new one.
        """
        if self._threads is None:
            raise NotOpenError(f"{self._name} was restarted while it was idle")
        hollow: Task[Any] = unpacked(task)
        found = unpacked(state)
        exact, seen = found if isinstance(found, tuple) else (found, None)
        model = replace(hollow.model, state=exact, base=unpacked(base), sent=seen)
        whole = hollow.on(model)
        answer = self._threads.submit(whole, halvings).result()
        if apart and isinstance(whole, Reduces):
            told, kept = whole.told_and_kept(answer.value)
            return packed((answer.seconds, told)), packed(kept)
        return packed((answer.seconds, answer.value))

    def join(self, task: Message, *results: Message, halvings: int = 0) -> Message:
        """Join results of consecutive parts of a task, in order; raises NotOpenError as `run`."""
        del halvings
        if self._threads is None:
            raise NotOpenError(f"{self._name} was restarted while it was idle")
        with threadpool_limits(limits=1, user_api="blas"):
            return packed(unpacked(task).joined([*map(unpacked, results)]))
