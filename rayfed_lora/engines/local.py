"""Everything in this process, without Ray. Source: this project."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from rayfed_lora.engines.threads import Answer, TrainerThreads
from rayfed_lora.tasks.engine import (
    Pending,
    Population,
    Running,
    Task,
    Trainer,
    answer,
    runs,
)

R = TypeVar("R")


class _Later(Generic[R]):
    """Work that is done when its result is asked for."""

    def __init__(self, work: Callable[[], R]) -> None:
        self.result = work

    def cancel(self) -> None:
        """Leave it: what is not asked for is not begun."""


class _Answered(Generic[R]):
    """What a thread works on."""

    def __init__(self, future: Future[Answer[R]]) -> None:
        self._future = future
        self.cancel = future.cancel

    def result(self) -> R:
        return self._future.result().value


class LocalEngine:
    """Runs trainers in this process: one when its result is asked for, several in threads."""

    def __init__(self, make: Callable[[], tuple[Sequence[Trainer], Population]]) -> None:
        """Keep how the trainers are made.

        Args:
            make: called by `open`; returns the trainers, which share what they do not write to,
                and what each of them serves.
        """
        self._make = make
        self._trainers: Sequence[Trainer] = ()
        # None: there is only one trainer, and no thread for it.
        self._threads: TrainerThreads | None = None

    def open(self) -> Population:
        """Make the trainers."""
        self._trainers, population = self._make()
        if len(self._trainers) > 1:
            self._threads = TrainerThreads(self._trainers)
        return population

    def submit(self, task: Task[R]) -> Running[R]:
        """Start a task: with several trainers at once, with one when its result is asked for."""
        if not self._trainers:
            raise RuntimeError("the engine is not open: call open() first")
        pending: deque[Pending[R]] = deque()
        for run in runs(task):
            started = [self._started(part) for part in run]
            pending += started if len(run) == 1 else _in_run(task, started)
        return Running(task, pending)

    def _started(self, part: Task[R]) -> Pending[R]:
        if self._threads is None:
            return _Later(partial(answer, self._trainers[0], part))
        return _Answered(self._threads.submit(part))

    def close(self) -> None:
        """Let the trainers go; running tasks are not waited for, but by a process's end."""
        if self._threads is not None:
            self._threads.close()
        self._trainers, self._threads = (), None


class _InRun(Generic[R]):
    """A part of a run of several, whose results are joined once the last one is there."""

    def __init__(self, task: Any, part: Pending[R], kept: list[R], *, last: bool) -> None:
        self._task, self._part, self._kept, self._last = task, part, kept, last
        self.cancel = part.cancel

    def result(self) -> R:
        told: R
        told, kept = self._task.told_and_kept(self._part.result())
        self._kept.append(kept)
        if self._last:
            told = self._task.joined([told, self._task.joined(self._kept)])
        return told


def _in_run(task: Any, parts: Sequence[Pending[R]]) -> list[_InRun[R]]:
    kept: list[R] = []
    last = len(parts) - 1
    return [_InRun(task, part, kept, last=i == last) for i, part in enumerate(parts)]
