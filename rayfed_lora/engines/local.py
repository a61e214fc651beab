"""Everything in this process, without Ray. Source: this project."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import zip_longest
from typing import Generic, TypeVar

from rayfed_lora.aggregation.means import Means
from rayfed_lora.engines.threads import TrainerThreads
from rayfed_lora.engines.waiting import LAST
from rayfed_lora.federation.calls import Starts, Training, joined
from rayfed_lora.federation.executor import (
    PATIENCE,
    Call,
    Pending,
    Population,
    Trained,
    joins,
)
from rayfed_lora.training.protocol import Trainer
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

_T = TypeVar("_T")
# Waits for the reports of a call's clients and their means.
_Reduced = Callable[[], tuple[tuple[ClientUpdate, ...], Means]]


class _Later(Generic[_T]):
    """Work that is done when its result is asked for: what a Future is to another thread."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self.result = work

    def cancel(self) -> None:
        """Leave it: who does not ask for it does not begin it."""

    def done(self) -> bool:
        """Return False: it is not kept."""
        return False


class LocalExecutor:
    """Runs trainers in this process: one when its work is asked for, several in threads."""

    def __init__(self, rule: str, make: Callable[[], tuple[Sequence[Trainer], Population]]) -> None:
        """Keep how the trainers are made.

        Args:
            rule: name of the aggregation rule.
            make: called by `open`; returns the trainers, which share what they do not write to,
                and what each of them serves.
        """
        self._rule = rule
        self._make = make
        self.concurrent, self.patience = False, 0
        self._trainers: Sequence[Trainer] = ()
        # None: there is only one trainer, and no thread for it.
        self._threads: TrainerThreads | None = None

    def open(self) -> Population:
        """Make the trainers."""
        self._trainers, population = self._make()
        self.concurrent = len(self._trainers) > 1
        self.patience = PATIENCE if self.concurrent else 0
        self._threads = TrainerThreads(self._trainers) if self.concurrent else None
        return population

    def _opened(self) -> Trainer:
        if not self._trainers:
            raise RuntimeError("the executor is not open: call open() first")
        return self._trainers[0]

    def _begun(
        self, works: Sequence[Callable[[Trainer], _T]], *, before: int = 0, round_: int = LAST
    ) -> Sequence[Future[_T] | _Later[_T]]:
        """Let idle trainers do some things, in order, behind what waits and is not passed."""
        only = self._opened()
        if self._threads is None:
            return [_Later(partial(work, only)) for work in works]
        return self._threads.submit(*works, before=before, round_=round_)

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        return self._opened().initial_tensors(trainable)

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[Call]
    ) -> Generator[Trained, None, None]:
        """Yield what comes of each call, in order."""
        drawer, threads = self._opened(), self._threads

        def work(training: Training, soon: Training | None, trainer: Trainer) -> _Reduced:
            if threads is not None and soon is not None:
                threads.beside(soon.draw, drawer)
            training.train(trainer)
            return training.reduced if threads is None else threads.beside(training.reduced).result

        trainings = [Training(call, state, base, plan, self._rule) for call in calls]
        # What comes up when each trainer has done what it is at.
        soon = trainings[len(self._trainers) :]
        pairs = zip_longest(trainings, soon)
        works = [partial(work, *pair) for pair in pairs]
        return self._collected(deque(self._begun(works, round_=plan.round)))

    def _collected(
        self, begun: deque[Future[_Reduced] | _Later[_Reduced]]
    ) -> Generator[Trained, None, None]:
        try:
            for run in joins(range(len(begun))):
                parts: list[Means] = []
                for i in run:
                    # Nothing of it stays here when it has been told.
                    reduced = begun.popleft().result()
                    reports, means = reduced()
                    del reduced
                    parts.append(means)
                    if i != run[-1]:
                        yield Trained(reports, None)
                whole = parts[0] if len(run) == 1 else joined(parts, self._rule)
                yield Trained(reports, whole)
        finally:
            for call in begun:
                call.cancel()

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        before: int = 0,
    ) -> Pending[list[Predictions]]:
        """Return what waits for the predictions on each shard of rows, in order."""

        def work(rows: slice, trainer: Trainer) -> Predictions:
            return trainer.evaluate(split, rows, state, base, trainable)

        return _pending(self._begun([partial(work, rows) for rows in shards], before=before))

    def test_clients(
        self,
        calls: Sequence[Call],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        before: int = 0,
    ) -> Pending[list[ClientScore]]:
        """Return what waits for tests of clients on their own examples, in order."""

        def work(call: Call, trainer: Trainer) -> list[ClientScore]:
            starts = Starts(state, call)
            states = [starts.of(client) for client in call.clients]
            return trainer.test_clients(call.clients, states, base, trainable)

        found = _pending(self._begun([partial(work, call) for call in calls], before=before))
        return found.then(lambda parts: [score for part in parts for score in part])

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        (begun,) = self._begun([lambda trainer: trainer.export(state, base, trainable)])
        files: dict[str, bytes] = begun.result()
        return files

    def close(self) -> None:
        """Let the trainers go; what threads are doing is not waited for, but by a process's end."""
        if self._threads is not None:
            self._threads.close()
        self._trainers, self._threads = (), None
        self.concurrent, self.patience = False, 0


def _pending(begun: Sequence[Future[_T] | _Later[_T]]) -> Pending[list[_T]]:
    return Pending(
        lambda: [each.result() for each in begun], lambda: all(each.done() for each in begun)
    )
