"""Trainers of one process, each with a thread: what Ray's actors and runs without Ray share.

Source: this project.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from rayfed_lora.engines.waiting import LAST, put
from rayfed_lora.training import python_lock
from rayfed_lora.training.protocol import Trainer

_T = TypeVar("_T")


@dataclass(eq=False)
class _Job:
    """What one trainer does, with a future of what comes of it; the rest as of `Waits`."""

    work: Callable[[Trainer], Any]
    round: int
    before: int
    future: Future[Any] = field(default_factory=Future)

    def run(self, trainer: Trainer) -> None:
        """Do it, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work(trainer))
        except BaseException as error:  # whatever it is, it is for who asks for the result
            self.future.set_exception(error)


class TrainerThreads:
    """Does work in the order in which it comes, each time with a trainer that has nothing to do.

    One more thread draws batches and sums up results while the others compute.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        """Start no thread yet.

        Args:
            trainers: they share what they do not write to. There are as many threads.
        """
        self.trainers = tuple(trainers)
        self._idle: SimpleQueue[Trainer] = SimpleQueue()
        for trainer in trainers:
            self._idle.put(trainer)
        self._waiting: deque[_Job] = deque()
        self._queueing = Lock()
        # Some libraries keep the limit by thread; a sum must not depend on the number of cores.
        alone = partial(threadpool_limits, 1, "blas")
        self._threads = ThreadPoolExecutor(len(self.trainers), "training", alone)
        self._beside = ThreadPoolExecutor(1, "beside", alone)

    @property
    def idle(self) -> bool:
        """Whether a trainer has nothing to do."""
        return not self._idle.empty()

    def submit(
        self, *works: Callable[[Trainer], _T], round_: int = LAST, before: int = 0
    ) -> list[Future[_T]]:
        """Do some things behind what waits and is not passed.

        Args:
            works: what to do, in order.
            round_: that they train, if any.
            before: the first round that may not be trained before them.
        """
        jobs = [_Job(work, round_, before) for work in works]
        with self._queueing:
            put(self._waiting, jobs)
        for _ in jobs:
            self._threads.submit(self._turn)
        return [job.future for job in jobs]

    def _turn(self) -> None:
        """Do what comes first; there are as many turns as jobs."""
        with self._queueing:
            job = self._waiting.popleft()
        # There is one: as many trainers as threads.
        trainer = self._idle.get()
        try:
            job.run(trainer)
        finally:
            self._idle.put(trainer)

    def beside(self, work: Callable[..., _T], *args: Any) -> Future[_T]:
        """Do something that takes no trainer, while those who compute rarely need Python's lock."""
        return self._beside.submit(_unhurried, work, *args)

    def close(self, *, wait: bool = False) -> None:
        """Begin nothing more.

        Args:
            wait: until what the threads are doing is done; else only a process's end waits for it.
        """
        with self._queueing:
            for job in self._waiting:
                job.future.cancel()
        for threads in (self._threads, self._beside):
            threads.shutdown(wait=wait, cancel_futures=True)


def _unhurried(work: Callable[..., _T], *args: Any) -> _T:
    python_lock.wait()
    return work(*args)
