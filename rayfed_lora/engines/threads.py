"""Trainers of one process, each with a thread: for runs without Ray, and inside Ray's actors.

Source: this project.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from threadpoolctl import threadpool_limits

from rayfed_lora.tasks.engine import Task, Trainer, answer

R = TypeVar("R")


@dataclass(frozen=True)
class Answer(Generic[R]):
    """The result of a task, and the seconds that a trainer worked on it."""

    value: R
    seconds: float


class TrainerThreads:
    """Has tasks answered in the order in which they come, each by a trainer that is idle."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        """Start no thread yet.

        Args:
            trainers: they share what they do not write to. There are as many threads.
        """
        self._idle: SimpleQueue[Trainer] = SimpleQueue()
        for trainer in trainers:
            self._idle.put(trainer)
        # Some libraries keep the limit by thread; a sum must not depend on the number of cores.
        alone = partial(threadpool_limits, 1, "blas")
        self._threads = ThreadPoolExecutor(len(trainers), "training", alone)

    def submit(self, task: Task[R], halvings: int = 0) -> Future[Answer[R]]:
        """Start a task behind those that wait.

        Args:
            task: answered whole, by one trainer.
            halvings: as of `answer`.
        """
        return self._threads.submit(self._answer, task, halvings)

    def _answer(self, task: Task[R], halvings: int) -> Answer[R]:
        # One is idle: there are as many trainers as threads.
        trainer = self._idle.get()
        began = time.perf_counter()
        try:
            return Answer(answer(trainer, task, halvings), time.perf_counter() - began)
        finally:
            self._idle.put(trainer)

    def close(self, *, wait: bool = False) -> None:
        """Begin nothing more.

        Args:
            wait: until running tasks are done; else only a process's end waits for them.
        """
        self._threads.shutdown(wait=wait, cancel_futures=True)
