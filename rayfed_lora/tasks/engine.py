"""The seam: a round loop submits tasks to an engine, an engine has them answered by trainers.

Source: this project.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from rayfed_lora.data.prompts import PromptFacts
from rayfed_lora.errors import BlockMemoryError
from rayfed_lora.types import AdapterState, Device, DeviceFacts, GlobalModel, ModelShape, Split

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
IndexArray = npt.NDArray[np.int64]
# Parts whose results the caller joins alone; results of more parts are joined in runs.
_MOST_ALONE, _JOINED = 64, 32


class Task(Protocol[R]):
    """A message that a trainer answers, and how it is split and its results are joined.

    Attributes:
        name: what a message to the user calls it.
        kind: the same for all tasks that do the same.
        limited: whether `runtime.block_timeout_s` holds for it.
        units: number of pieces that a count of repeated work counts, such as blocks.
        size: number of clients that it trains.
        model: the global model that it is about.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def limited(self) -> bool: ...  # noqa: D102
    @property
    def units(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def model(self) -> GlobalModel: ...  # noqa: D102

    def on(self, model: GlobalModel) -> Task[R]:
        """Return the same task about another model."""
        ...

    def parts(self) -> Sequence[Task[R]]:
        """Return tasks for any trainers whose results, joined in order, are this one's."""
        ...

    def halves(self, reason: str | None) -> Sequence[Task[R]]:
        """Return smaller tasks that need less memory at once; none where there are none.

        Args:
            reason: why, for the user; None: the user knows.
        """
        ...

    def joined(self, results: Sequence[R]) -> R:
        """Return the result of this task from those of its parts or halves, in order."""
        ...


@runtime_checkable
class Reduces(Protocol[R]):
    """A task whose joined results are smaller than the results of its parts: a sum, a mean."""

    def told_and_kept(self, result: R) -> tuple[R, R]:
        """Return the result of a part in two: what is told at once, and what is to be joined.

        Both are joined as whole results are.
        """
        ...


class Trainer(Protocol):
    """Answers tasks on one resident model. Keeps nothing between two tasks that a result shows."""

    def shape(self) -> ModelShape:
        """Return the model's sizes."""
        ...

    def run(self, task: Task[R]) -> R:
        """Answer a task.

        Raises:
            ClientError: a client's training raised, and the task does not tolerate that.
            BlockMemoryError: the task does not fit into memory, and has halves.
        """
        ...


class Pending(Protocol[R_co]):
    """Something that will have a result: a `concurrent.futures.Future` is one."""

    def result(self) -> R_co:
        """Wait for the result and return it, or raise what it came to."""
        ...

    def cancel(self) -> object:
        """Do not begin it, where it has not begun."""
        ...


@dataclass(frozen=True)
class Running(Generic[R]):
    """A submitted task.

    Attributes:
        task: what was submitted.
        pending: results of its parts, in order; to be taken from the left, so that no result stays
            in memory longer than it is used. Of a run of parts, what is joined comes with the last.
        reruns: returns how many units were run again, because a worker or a result was lost.
    """

    task: Task[R]
    pending: deque[Pending[R]]
    reruns: Callable[[], int] = lambda: 0

    def result(self) -> R:
        """Wait for all parts and return their joined result."""
        try:
            results = []
            while self.pending:
                results.append(self.pending.popleft().result())
            return self.task.joined(results)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Begin no more parts."""
        for part in self.pending:
            part.cancel()


class Engine(Protocol):
    """Has tasks answered. Results never depend on which engine it is, or on its size."""

    def open(self) -> Population:
        """Make everything ready and say what there is."""
        ...

    def submit(self, task: Task[R]) -> Running[R]:
        """Start a task, behind what was submitted before; return at once."""
        ...

    def close(self) -> None:
        """Free what `open` took."""
        ...


@dataclass(frozen=True)
class Population:
    """What the round loop needs to know of data, clients and model.

    Attributes:
        shape: the model's sizes.
        clients: number of clients.
        examples: number of examples of each split.
        label_names: name of class i at place i.
        device: kind of device that clients are trained on.
        devices: number of examples of each client, and what its device is like.
        label_counts: clients (k,) that stand for all, and how many training examples of each class
            they hold (k, classes).
        notes: what the user should know of data and model before the first round, one line each.
        client_names: (clients,) what the data call each client; None where they do not.
        fingerprint: digest by part of the data, empty where none was made.
        start: the adapter that the run starts from; None: new factors.
        prompts: that the trained model answers; None: none are asked.
    """

    shape: ModelShape
    clients: int
    examples: dict[Split, int]
    label_names: tuple[str, ...] = ()
    device: Device = "cpu"
    devices: DeviceFacts = field(default_factory=lambda: DeviceFacts(np.zeros(0, np.int64)))
    label_counts: tuple[IndexArray, IndexArray] | None = None
    notes: tuple[str, ...] = ()
    client_names: tuple[str, ...] | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    start: AdapterState | None = None
    prompts: PromptFacts | None = None


def runs(task: Task[R]) -> list[Sequence[Task[R]]]:
    """Cut the parts of a task into runs, the results of each of which are joined by a worker.

    A part is a run of its own where there are few, or where joining reduces nothing. Never a matter
    of the engine: sums of floating-point numbers depend on how they are joined.
    """
    parts = task.parts()
    step = 1 if len(parts) <= _MOST_ALONE or not isinstance(task, Reduces) else _JOINED
    return [parts[i : i + step] for i in range(0, len(parts), step)]


def answer(trainer: Trainer, task: Task[R], halvings: int = 0) -> R:
    """Have a trainer answer a task, in halves where memory is short.

    Args:
        trainer: answers.
        task: the whole of it.
        halvings: how often to halve it at once, since it has ended workers before.

    Raises:
        BlockMemoryError: it does not fit, and has no halves.
        ClientError: as of `Trainer.run`.
    """
    halves: Sequence[Task[R]] = ()
    if halvings > 0:
        halves = task.halves(None)
    if not halves:
        try:
            return trainer.run(task)
        except BlockMemoryError as error:
            # Without the traceback, which would hold the tensors of the failed attempt.
            failure = error.with_traceback(None)
            failure.__cause__ = failure.__context__ = None
        halves = task.halves(str(failure))
        if not halves:
            raise failure
    return task.joined([answer(trainer, half, halvings - 1) for half in halves])
