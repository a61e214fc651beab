"""Everything in this process, without Ray. Source: this project."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from threadpoolctl import threadpool_limits

from rayfed_lora.aggregation.means import Means
from rayfed_lora.federation.executor import (
    Call,
    Population,
    Starts,
    Trained,
    Training,
    joined,
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
        self.concurrent = False
        self._trainers: Sequence[Trainer] = ()
        # Trainers that have nothing to do; None: there is only one, and no thread for it.
        self._idle: SimpleQueue[Trainer] | None = None
        self._threads: ThreadPoolExecutor | None = None
        # One more thread sums up what a call has come to, while its trainer does the next one.
        self._summing: ThreadPoolExecutor | None = None

    def open(self) -> Population:
        """Make the trainers."""
        self._trainers, population = self._make()
        if len(self._trainers) > 1:
            self._idle = SimpleQueue()
            for trainer in self._trainers:
                self._idle.put(trainer)
            # Some libraries keep the limit by thread; a sum must not depend on their number.
            alone = partial(threadpool_limits, 1, "blas")
            self._threads = ThreadPoolExecutor(len(self._trainers), "training", alone)
            self._summing = ThreadPoolExecutor(1, "summing", alone)
            self.concurrent = True
        return population

    def _opened(self) -> Trainer:
        if not self._trainers:
            raise RuntimeError("the executor is not open: call open() first")
        return self._trainers[0]

    def _begun(self, work: Callable[[Trainer], _T]) -> Future[_T] | _Later[_T]:
        """Let the next idle trainer do some work, in the order in which it is begun."""
        only, idle = self._opened(), self._idle
        if self._threads is None or idle is None:
            return _Later(partial(work, only))

        def done() -> _T:
            # There is one: as many trainers as threads.
            trainer = idle.get()
            try:
                return work(trainer)
            finally:
                idle.put(trainer)

        return self._threads.submit(done)

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        return self._opened().initial_tensors(trainable)

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[Call]
    ) -> Generator[Trained, None, None]:
        """Yield what comes of each call, in order."""
        summing = self._summing

        def trained(call: Call, trainer: Trainer) -> _Reduced:
            training = Training(trainer, call, state, base, plan, self._rule)
            training.train()
            if summing is None:
                return training.reduced
            return summing.submit(training.reduced).result

        return self._collected(deque(self._begun(partial(trained, call)) for call in calls))

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
    ) -> Callable[[], list[Predictions]]:
        """Return what waits for the predictions on each shard of rows, in order."""

        def evaluated(rows: slice, trainer: Trainer) -> Predictions:
            return trainer.evaluate(split, rows, state, base, trainable)

        begun = [self._begun(partial(evaluated, rows)) for rows in shards]
        return lambda: [each.result() for each in begun]

    def test_clients(
        self, calls: Sequence[Call], state: AdapterState, base: Base, trainable: Trainable
    ) -> Callable[[], list[ClientScore]]:
        """Return what waits for tests of clients on their own examples, in order."""

        def tested(call: Call, trainer: Trainer) -> list[ClientScore]:
            starts = Starts(state, call)
            states = [starts.of(client) for client in call.clients]
            return trainer.test_clients(call.clients, states, base, trainable)

        begun = [self._begun(partial(tested, call)) for call in calls]
        return lambda: [score for each in begun for score in each.result()]

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        self._opened()
        return self._begun(lambda trainer: trainer.export(state, base, trainable)).result()

    def close(self) -> None:
        """Let the trainers go; what threads are doing is not waited for, but by a process's end."""
        for threads in (self._threads, self._summing):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
        self._trainers, self._idle, self._threads, self._summing = (), None, None, None
        self.concurrent = False
