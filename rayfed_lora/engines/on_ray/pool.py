"""Work on a set of client actors: every actor kept busy, lost work run again.

Source: this project.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
)

from rayfed_lora.engines.on_ray.actors import NotOpenError, Timed
from rayfed_lora.engines.waiting import LAST, put
from rayfed_lora.errors import RayfedError, RunError

ATTEMPTS = 4
_RESTART_POLL_S = 0.5
LOST = (ActorDiedError, ActorUnavailableError, OutOfMemoryError, NotOpenError)
# Ray does not say of an actor that it restarts whether its memory was to blame (tried with 2.60):
# work that has lost so many is done in smaller blocks from then on.
_LOST_BEFORE_HALVING = 2


class PartsLostError(RunError):
    """What a call was to work on, other calls' results, was lost with the node that held it."""


class RemoteCall(Protocol):
    """Calls a method of an actor; done when the first of its results is there."""

    def __call__(self, actor: Any, halvings: int) -> list[ray.ObjectRef]:
        """Return the references of the results.

        Args:
            actor: that does it.
            halvings: how often blocks are to be halved, memory being short.
        """
        ...


@dataclass(frozen=True)
class Work:
    """A call.

    Attributes:
        name: what to call it where it is lost.
        call: makes it.
        read: turns the first of its results into what is asked for.
        limited: whether `block_timeout_s` is for it.
        round: that it trains, if any.
        before: the first round whose training may be asked for later, but not done before it.
        kind: calls of the same kind take about equally long.
    """

    name: str
    call: RemoteCall
    read: Callable[[Any], Any] = lambda value: value
    limited: bool = False
    round: int = LAST
    before: int = 0
    kind: str = ""


@dataclass(eq=False)
class Job:
    """A call that some actor makes.

    Attributes:
        work: the call.
        attempts: how often it was lost in its turn.
        begun: how often an actor began it, as far as is known.
        halvings: how often its blocks are to be halved, memory being short.
        since: `time.monotonic()` at which an actor began it.
        value: its first result, once `done`.
        rest: references of its other results, which stay where they are.
        error: why it has no result and never will.
        done: whether it is over.
    """

    work: Work
    attempts: int = 0
    begun: int = 0
    halvings: int = 0
    since: float = 0.0
    value: Any = None
    rest: list[ray.ObjectRef] = field(default_factory=list)
    error: RayfedError | None = None
    done: bool = False

    @property
    def round(self) -> int:
        """As of its work."""
        return self.work.round

    @property
    def before(self) -> int:
        """As of its work."""
        return self.work.before


@dataclass(eq=False)
class _Worker:
    """An actor and what it has been sent, in the order in which it does it.

    Attributes:
        actor: its handle.
        at_once: how many calls it does at once.
        jobs: the first of them are being done.
        seconds: what a call of each kind took it last.
    """

    actor: Any
    at_once: int
    jobs: list[Job] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def doing(self) -> list[Job]:
        """What it does now."""
        return self.jobs[: self.at_once]

    @property
    def limited(self) -> list[Job]:
        """What it does now and may not take for ever."""
        return [job for job in self.doing if job.work.limited]

    def late(self, limit_s: float) -> list[Job]:
        """Return what it may have taken too long for.

        What was sent right behind a test that it may pass can be first there: it may be to blame
        too.
        """
        now = time.monotonic()
        late = [job for job in self.limited if now - job.since >= limit_s]
        tests = [job for job in late if job.before > 0]
        behind = [job for job in self.jobs[self.at_once :] if job.work.limited]
        passing = [job for job in behind if any(job.round < test.before for test in tests)]
        return late + passing[: len(tests)]

    def takes(self, job: Job, most: int) -> bool:
        """Return whether it may be sent a job.

        What others may pass is sent beside them: an actor then has something to do at once when it
        has trained, and trains at once when it is asked to.

        Args:
            job: what it would be sent.
            most: how many jobs it may have of those that may be passed, and of the others.
        """
        return sum((each.before > 0) == (job.before > 0) for each in self.jobs) < most

    def add(self, job: Job) -> None:
        """Note that it was sent a job."""
        put(self.jobs, [job], len(self.doing))
        job.since = time.monotonic()

    def remove(self, job: Job) -> None:
        """Note that a job is over: the next one that waited is begun."""
        self.jobs.remove(job)
        for next_one in self.jobs[self.at_once - 1 : self.at_once]:
            next_one.since = time.monotonic()

    def expected_s(self, job: Job, usual_s: Mapping[str, float]) -> float:
        """Return when it will have done one more job.

        Args:
            job: that it would be sent.
            usual_s: what a call of each kind takes that it has not done yet; else 0.
        """
        known_s = {**usual_s, **self.seconds}
        now = time.monotonic()
        free_s, jobs = [0.0] * self.at_once, [*self.jobs]
        last = put(jobs, [job], len(self.doing))
        for place, each in enumerate(jobs[: last + 1]):
            took_s = known_s.get(each.work.kind, 0.0)
            if place < len(self.doing):
                took_s = max(took_s - (now - each.since), 0.0)
            done_s = free_s[0] + took_s
            heapq.heapreplace(free_s, done_s)
        return done_s


@dataclass(frozen=True)
class Revival:
    """How a lost actor comes back.

    Attributes:
        reopen: makes an actor ready again that Ray has restarted.
        renewed: returns another actor in place of one that Ray cannot restart for now.
        prepare_again: makes what `reopen` needs once more: it was lost with a node.
    """

    reopen: Callable[[Any], ray.ObjectRef]
    renewed: Callable[[Any], Any] = lambda actor: actor
    prepare_again: Callable[[], None] = lambda: None


class ActorPool:
    """Runs jobs on the next free actor, in the order they were submitted; urgent ones first."""

    def __init__(
        self,
        actors: Sequence[Any],
        revival: Revival,
        note: Callable[[str], None],
        start_timeout_s: float,
        ahead: int = 0,
        block_timeout_s: float | None = None,
        at_once: int = 1,
    ) -> None:
        """Take open actors.

        Args:
            actors: handles that are ready to be called.
            revival: how a lost actor comes back.
            note: told of what the user should know, e.g. a lost actor.
            start_timeout_s: how long a lost actor may take to come back while nothing else runs.
            ahead: how many jobs an actor is sent for each that it still works on: it then never
                waits for a message. Of use where jobs take equally long.
            block_timeout_s: an actor that takes longer for a job is ended; None: no limit.
            at_once: how many jobs an actor does at the same time.
        """
        self._workers = [_Worker(actor, at_once) for actor in actors]
        self._revival = revival
        self._note = note
        self._start_timeout_s = start_timeout_s
        self._depth = at_once * (1 + ahead)
        # How many actors there were at first, what each does at once, and how often one was lost.
        self.actors, self.at_once, self.losses = len(actors), at_once, 0
        self._block_timeout_s = block_timeout_s
        # `time.monotonic()` since which no actor is left that works.
        self._alone_since = 0.0
        # What a call of each kind took last, whoever did it.
        self._usual_s: dict[str, float] = {}
        self._waiting: deque[Job] = deque()
        self._running: dict[ray.ObjectRef, tuple[Job, list[ray.ObjectRef], _Worker]] = {}
        # Workers that Ray is restarting, by the call that tells when they are back.
        self._returning: dict[ray.ObjectRef, _Worker] = {}

    def submit(self, works: Sequence[Work], urgent: bool = False) -> list[Job]:
        """Queue some calls, urgent ones before all that wait, and start what can start."""
        jobs = [Job(work) for work in works]
        self._queue(jobs, urgent)
        return jobs

    def again(self, job: Job) -> None:
        """Run a job again whose results were lost after it was done."""
        job.done, job.value, job.rest, job.error = False, None, [], None
        self._queue([job], urgent=True)

    def _queue(self, jobs: list[Job], urgent: bool) -> None:
        if urgent:
            self._waiting.extendleft(reversed(jobs))
        else:
            put(self._waiting, jobs)
        self._start()

    def drop(self, jobs: Sequence[Job]) -> None:
        """Do not start those of the jobs that still wait."""
        self._waiting = deque(job for job in self._waiting if job not in jobs)

    def result(self, job: Job) -> Any:
        """Return a job's first result, going on with all others until it is there.

        Raises:
            RayfedError: what the call raised.
            PartsLostError: what it was to work on was lost.
            RunError: it was lost again and again, or no actor is left.
        """
        while not job.done:
            self._advance()
        if job.error is not None:
            raise job.error
        return job.value

    def _start(self) -> None:
        while self._waiting and self._workers:
            job = self._waiting[0]
            worker = min(self._workers, key=partial(self._place, job))
            # Who has room may still be the last one to come to it.
            if not worker.takes(job, self._depth):
                return
            self._waiting.popleft()
            references = job.work.call(worker.actor, job.halvings)
            job.begun += 1
            worker.add(job)
            self._running[references[0]] = (job, references, worker)

    def _place(self, job: Job, worker: _Worker) -> tuple[bool, float, int]:
        """Return what is least for who is to do a job: who will have done it first.

        Idle ones come before all others: who was slow once would never be asked again.
        """
        busy = len(worker.jobs) >= worker.at_once
        return busy, worker.expected_s(job, self._usual_s), len(worker.jobs)

    def _advance(self) -> None:
        """Wait for the next call, or for an actor that comes back."""
        ready = self._next_ready()
        if ready is None:
            self._end_stuck()
        elif ready in self._returning:
            self._back(ready)
        else:
            self._take(ready)
        self._start()

    def _take(self, ready: ray.ObjectRef) -> None:
        """Take a call's result in, or what it raised, which is for whoever asks for that job."""
        job, references, worker = self._running[ready]
        lost: ObjectLostError | None = None
        try:
            job.value = job.work.read(result(ready))
            if isinstance(job.value, Timed):
                took_s = {job.work.kind: job.value.seconds}
                worker.seconds |= took_s
                self._usual_s |= took_s
            job.rest, job.done = references[1:], True
        except LOST as error:
            self._lost(worker, error)
            return
        except ObjectLostError as error:
            lost = error
        except RayfedError as error:
            job.error, job.done = error, True
        del self._running[ready]
        worker.remove(job)
        if lost is not None:
            self._result_lost(job, lost)

    def _result_lost(self, job: Job, error: ObjectLostError) -> None:
        """Run a job again whose result was lost with the node that held it."""
        job.attempts += 1
        if job.attempts >= ATTEMPTS:
            why = f"the results of {job.work.name} were lost {ATTEMPTS} times: {error}"
            job.error, job.done = RunError(why), True
            return
        self._note(f"the results of {job.work.name} were lost, and are computed again")
        self._waiting.appendleft(job)

    def _next_ready(self) -> ray.ObjectRef | None:
        """Return the next call that is done or lost; None where one has taken too long."""
        pending = [*self._running, *self._returning]
        if not pending:
            raise RunError("every client actor is lost for good")
        timeout = self._left_s() if self._running else self._start_timeout_s
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout, fetch_local=True)
        if ready:
            return ready[0]
        if not self._running:
            raise self._none_came_back()
        return None

    def _none_came_back(self) -> RunError:
        limit = self._start_timeout_s
        return RunError(f"no client actor came back within {limit:g} s after it was lost")

    def _left_s(self) -> float | None:
        """Return the seconds until some running job will have taken too long."""
        if self._block_timeout_s is None:
            return None
        began = [job.since for worker in self._workers for job in worker.limited]
        return max(min(began) + self._block_timeout_s - time.monotonic(), 0.0) if began else None

    def _end_stuck(self) -> None:
        """End the actors that have taken too long for a job, and run their work again."""
        limit = self._block_timeout_s or 0.0
        stuck = [(worker, worker.late(limit)) for worker in self._workers]
        for worker, late in stuck:
            if not late:
                continue
            # A running method cannot be cancelled; Ray starts the process again.
            ray.kill(worker.actor, no_restart=False)
            names = _named(late)
            error = TimeoutError(f"{names} took longer than {limit:g} s (runtime.block_timeout_s)")
            self._lost(worker, error, late)

    def _lost(self, worker: _Worker, error: Exception, blamed: Sequence[Job] | None = None) -> None:
        """Take back all that a lost actor had been sent.

        Args:
            worker: the actor.
            error: how it was lost.
            blamed: the jobs that may be to blame; None: all that it had begun.
        """
        reason = str(error).strip().splitlines()[0]
        self.losses += 1
        self._running = {r: sent for r, sent in self._running.items() if sent[2] is not worker}
        blamed = worker.doing if blamed is None else blamed
        for job in worker.jobs[worker.at_once :]:
            if job not in blamed:
                job.begun -= 1
        again = "run again"
        for job in blamed:
            job.attempts += 1
            if isinstance(error, OutOfMemoryError) or job.attempts >= _LOST_BEFORE_HALVING:
                job.halvings += 1
                again = "run again in smaller blocks, in case memory was short"
            if job.attempts >= ATTEMPTS:
                why = f"{job.work.name} lost {ATTEMPTS} actors one after another: {reason}"
                job.error, job.done = RunError(why), True
        kept = [job for job in worker.jobs if not job.done]
        if any(job in kept for job in blamed):
            lost_in = f"a client actor was lost in {_named(blamed)}"
            self._note(f"{lost_in} and its work is {again}: {reason}")
        worker.jobs = []
        self._waiting.extendleft(reversed(kept))
        self._workers.remove(worker)
        if not self._workers:
            self._alone_since = time.monotonic()
        self._revive(worker, error)

    def _revive(self, worker: _Worker, error: Exception) -> None:
        """Wait in the background for an actor that Ray restarts; forget one it does not."""
        if not isinstance(error, ActorDiedError):
            self._returning[self._revival.reopen(worker.actor)] = worker

    def _back(self, opened: ray.ObjectRef) -> None:
        """Take an actor in that is back, or wait on if it was lost again.

        Raises:
            RunError: it was lost again, and none has worked for so long.
        """
        worker = self._returning.pop(opened)
        try:
            result(opened)
        except PartsLostError:
            self._note("data and base were lost with their node and are prepared again")
            self._revival.prepare_again()
            self._returning[self._revival.reopen(worker.actor)] = worker
        except LOST as error:
            alone_s = time.monotonic() - self._alone_since
            if not self._workers and alone_s > self._start_timeout_s:
                raise self._none_came_back() from error
            # Ray refuses calls for the seconds that a restart takes; do not ask in a tight loop.
            time.sleep(_RESTART_POLL_S)
            renewed = self._revival.renewed(worker.actor)
            if renewed is worker.actor:
                self._revive(worker, error)
            else:
                self._note("a client actor's node is gone: another one starts where there is room")
                worker.actor = renewed
                self._returning[self._revival.reopen(renewed)] = worker
        else:
            self._workers.append(worker)


def _named(jobs: Sequence[Job]) -> str:
    return " and ".join(job.work.name for job in jobs)


def result(reference: ray.ObjectRef) -> Any:
    """Return a call's result; raise the user's errors as they were, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (RayfedError, NotOpenError)):
            raise cause from None
        if isinstance(cause, ObjectLostError):
            raise PartsLostError(str(cause)) from error
        raise RunError(f"a worker failed:\n{error}") from error
