"""Trainers of one process, each with a thread: what Ray's actors and runs without Ray share.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from rayfed_lora.training import python_lock
from rayfed_lora.training.protocol import Trainer

_T = TypeVar("_T")


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
        # Some libraries keep the limit by thread; a sum must not depend on the number of cores.
        alone = partial(threadpool_limits, 1, "blas")
        self._threads = ThreadPoolExecutor(len(self.trainers), "training", alone)
        self._beside = ThreadPoolExecutor(1, "beside", alone)

    def submit(self, work: Callable[[Trainer], _T]) -> Future[_T]:
        """Do something behind all that waits."""
        return self._threads.submit(self._done, work)

    def _done(self, work: Callable[[Trainer], _T]) -> _T:
        # There is one: as many trainers as threads.
        trainer = self._idle.get()
        try:
            return work(trainer)
        finally:
            self._idle.put(trainer)

    def beside(self, work: Callable[..., _T], *args: Any) -> Future[_T]:
        """Do something that takes no trainer, while those who compute rarely need Python's lock."""
        return self._beside.submit(_unhurried, work, *args)

    def close(self) -> None:
        """Begin nothing more; what threads are doing is not waited for, but by a process's end."""
        for threads in (self._threads, self._beside):
            threads.shutdown(wait=False, cancel_futures=True)


def _unhurried(work: Callable[..., _T], *args: Any) -> _T:
    python_lock.wait()
    return work(*args)
