"""Work on a set of client actors: every actor kept busy, lost work run again.

Source: this project.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError

from rayfed_lora.engines.on_ray.calls import LOST, Job, PartsLostError, Work, Worker, result
from rayfed_lora.errors import RayfedError, RunError

ATTEMPTS = 4
_RESTART_POLL_S = 0.5
# Ray does not say of an actor that it restarts whether its memory was to blame (tried with 2.60):
# work that has lost so many is done in smaller blocks from then on.
_LOST_BEFORE_HALVING = 2


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
        self._workers = [Worker(actor, at_once) for actor in actors]
        self._revival = revival
        self._note = note
        self._start_timeout_s = start_timeout_s
        self._depth = at_once * (1 + ahead)
        # How many actors there were at first, what each does at once, and how often one was lost.
        self.actors, self.at_once, self.losses = len(actors), at_once, 0
        self._block_timeout_s = block_timeout_s
        # `time.monotonic()` since which no actor is left that works.
        self._alone_since = 0.0
        self._waiting: deque[Job] = deque()
        self._running: dict[ray.ObjectRef, tuple[Job, list[ray.ObjectRef], Worker]] = {}
        # Workers that Ray is restarting, by the call that tells when they are back.
        self._returning: dict[ray.ObjectRef, Worker] = {}

    def submit(self, works: Sequence[Work], urgent: bool = False) -> list[Job]:
        """Queue some calls, urgent ones before all that wait, and start what can start."""
        jobs = [Job(work) for work in works]
        if urgent:
            self._waiting.extendleft(reversed(jobs))
        else:
            self._waiting.extend(jobs)
        self._start()
        return jobs

    def again(self, job: Job) -> None:
        """Run a job again whose results were lost after it was done."""
        job.done, job.value, job.rest, job.error = False, None, [], None
        self._waiting.appendleft(job)
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
            worker = min(self._workers, key=lambda worker: len(worker.jobs))
            if len(worker.jobs) >= self._depth:
                return
            job = self._waiting.popleft()
            work = job.work
            method = getattr(worker.actor, work.method).options(**work.options)
            found = method.remote(*work.args, halvings=job.halvings)
            references = found if isinstance(found, list) else [found]
            job.begun += 1
            worker.add(job)
            self._running[references[0]] = (job, references, worker)

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
            job.value = result(ready)
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

    def _lost(self, worker: Worker, error: Exception, blamed: Sequence[Job] | None = None) -> None:
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

    def _revive(self, worker: Worker, error: Exception) -> None:
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
