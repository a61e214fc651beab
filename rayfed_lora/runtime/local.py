"""Everything in this process, without Ray. Source: this project."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, TypeVar

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
from rayfed_lora.training import python_lock
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


@dataclass(eq=False)
class _Job:
    """What one trainer does in one go.

    Attributes:
        begin: what needs no turn, such as drawing batches; returns the rest.
        ahead: whether `begin` is worth doing before the turn, beside another job.
        future: of what comes of it.
    """

    begin: Callable[[Trainer], Callable[[], Any]]
    ahead: bool
    future: Future[Any] = field(default_factory=Future)

    def run(self, trainer: Trainer, begun: Future[Callable[[], Any]] | None) -> None:
        """Do it, or what is left of it, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            rest = self.begin(trainer) if begun is None else begun.result()
            self.future.set_result(rest())
        except BaseException as error:  # whatever it is, it is for who asks for the result
            self.future.set_exception(error)


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
        # What no trainer has taken yet, in order.
        self._jobs: deque[_Job] = deque()
        self._taking = Lock()
        # One more thread draws the batches of a call before its turn, and sums up what one has come
        # to, while their trainers compute.
        self._beside: ThreadPoolExecutor | None = None

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
            self._beside = ThreadPoolExecutor(1, "beside", alone)
            self.concurrent = True
        return population

    def _opened(self) -> Trainer:
        if not self._trainers:
            raise RuntimeError("the executor is not open: call open() first")
        return self._trainers[0]

    def _begun(
        self, begins: Sequence[Callable[[Trainer], Callable[[], _T]]], *, ahead: bool = False
    ) -> list[Future[_T] | _Later[_T]]:
        """Let idle trainers do some jobs, in order, behind those that wait already."""
        only = self._opened()
        if self._threads is None:
            return [_Later(partial(_at_once, begin, only)) for begin in begins]
        jobs = [_Job(begin, ahead) for begin in begins]
        # All before the first turn: it looks at how many there are.
        self._jobs.extend(jobs)
        for _ in jobs:
            self._threads.submit(self._turn)
        return [job.future for job in jobs]

    def _turn(self) -> None:
        """Do the first job that waits, and then what was reserved meanwhile, with one trainer.

        There are as many turns as jobs: some find nothing left.
        """
        idle, beside = self._idle, self._beside
        if idle is None or beside is None:
            return
        # There is one: as many trainers as threads.
        trainer = idle.get()
        begun: Future[Callable[[], Any]] | None = None
        try:
            job = self._taken()
            while job is not None:
                after = self._taken(only_ahead=True)
                soon = None if after is None else beside.submit(_unhurried, after.begin, trainer)
                job.run(trainer, begun)
                job, begun = after, soon
        finally:
            idle.put(trainer)

    def _taken(self, *, only_ahead: bool = False) -> _Job | None:
        """Take the first job that waits, if any.

        Args:
            only_ahead: only one that is worth beginning ahead, and if each other trainer is left
                one like it: it may be done sooner than who has reserved it.
        """
        with self._taking:
            if not self._jobs:
                return None
            if only_ahead and (
                not self._jobs[0].ahead
                or sum(job.ahead for job in self._jobs) < len(self._trainers)
            ):
                return None
            return self._jobs.popleft()

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        return self._opened().initial_tensors(trainable)

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[Call]
    ) -> Generator[Trained, None, None]:
        """Yield what comes of each call, in order."""
        beside = self._beside

        def begin(call: Call, trainer: Trainer) -> Callable[[], _Reduced]:
            training = Training(trainer, call, state, base, plan, self._rule)

            def rest() -> _Reduced:
                training.train()
                if beside is None:
                    return training.reduced
                return beside.submit(_unhurried, training.reduced).result

            return rest

        return self._collected(
            deque(self._begun([partial(begin, call) for call in calls], ahead=True))
        )

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

        def begin(rows: slice, trainer: Trainer) -> Callable[[], Predictions]:
            return lambda: trainer.evaluate(split, rows, state, base, trainable)

        begun = self._begun([partial(begin, rows) for rows in shards])
        return lambda: [each.result() for each in begun]

    def test_clients(
        self, calls: Sequence[Call], state: AdapterState, base: Base, trainable: Trainable
    ) -> Callable[[], list[ClientScore]]:
        """Return what waits for tests of clients on their own examples, in order."""

        def begin(call: Call, trainer: Trainer) -> Callable[[], list[ClientScore]]:
            starts = Starts(state, call)
            states = [starts.of(client) for client in call.clients]
            return lambda: trainer.test_clients(call.clients, states, base, trainable)

        begun = self._begun([partial(begin, call) for call in calls])
        return lambda: [score for each in begun for score in each.result()]

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        self._opened()
        (begun,) = self._begun([lambda trainer: lambda: trainer.export(state, base, trainable)])
        files: dict[str, bytes] = begun.result()
        return files

    def close(self) -> None:
        """Let the trainers go; what threads are doing is not waited for, but by a process's end."""
        while (job := self._taken()) is not None:
            job.future.cancel()
        for threads in (self._threads, self._beside):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
        self._trainers, self._idle, self._threads, self._beside = (), None, None, None
        self.concurrent = False


def _at_once(begin: Callable[[Trainer], Callable[[], _T]], trainer: Trainer) -> _T:
    return begin(trainer)()


def _unhurried(work: Callable[..., _T], *args: Any) -> _T:
    """Do something beside those who compute, while they rarely need Python's lock."""
    python_lock.wait()
    return work(*args)
