"""Work on a set of client actors: every actor kept busy, lost work run again.

Source: this project.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayTaskError,
)

from rayfed_lora.errors import RayfedError, RunError
from rayfed_lora.runtime.actors import NotOpenError

ATTEMPTS = 4
_RESTART_POLL_S = 0.5
LOST = (ActorDiedError, ActorUnavailableError, OutOfMemoryError, NotOpenError)
# Calls a method of an actor; a call of several results is done when the first of them is there.
RemoteCall = Callable[[Any], "list[ray.ObjectRef]"]


@dataclass(eq=False)
class Job:
    """A call that some actor makes.

    Attributes:
        call: makes it.
        attempts: how often it was lost.
        value: its first result, once `done`.
        rest: references of its other results, which stay where they are.
        done: whether it is.
    """

    call: RemoteCall
    attempts: int = 0
    value: Any = None
    rest: list[ray.ObjectRef] = field(default_factory=list)
    done: bool = False


class ActorPool:
    """Runs jobs on the next idle actor, in the order they were submitted; urgent ones first."""

    def __init__(
        self,
        actors: Sequence[Any],
        reopen: Callable[[Any], ray.ObjectRef],
        note: Callable[[str], None],
        start_timeout_s: float,
    ) -> None:
        """Take open actors.

        Args:
            actors: handles that are ready to be called.
            reopen: makes an actor ready again that Ray has restarted.
            note: told of what the user should know, e.g. a lost actor.
            start_timeout_s: how long a lost actor may take to come back while nothing else runs.
        """
        self._idle = deque(actors)
        self._reopen = reopen
        self._note = note
        self._start_timeout_s = start_timeout_s
        self._waiting: deque[Job] = deque()
        self._running: dict[ray.ObjectRef, tuple[Job, list[ray.ObjectRef], Any]] = {}
        # Actors that Ray is restarting, by the call that tells when they are back.
        self._returning: dict[ray.ObjectRef, Any] = {}

    def submit(self, calls: Sequence[RemoteCall], urgent: bool = False) -> list[Job]:
        """Queue some calls, urgent ones before all that wait, and start what can start."""
        jobs = [Job(call) for call in calls]
        self._queue(jobs, urgent)
        return jobs

    def again(self, job: Job) -> None:
        """Run a job again whose results were lost after it was done."""
        job.done, job.value, job.rest = False, None, []
        self._queue([job], urgent=True)

    def _queue(self, jobs: list[Job], urgent: bool) -> None:
        if urgent:
            self._waiting.extendleft(reversed(jobs))
        else:
            self._waiting.extend(jobs)
        self._start()

    def drop(self, jobs: Sequence[Job]) -> None:
        """Do not start those of the jobs that still wait."""
        self._waiting = deque(job for job in self._waiting if job not in jobs)

    def result(self, job: Job) -> Any:
        """Return a job's first result, going on with all others until it is there.

        Raises:
            RayfedError: what the call raised.
            RunError: it was lost again and again, or no actor is left.
        """
        while not job.done:
            self._advance()
        return job.value

    def _start(self) -> None:
        while self._waiting and self._idle:
            job, actor = self._waiting.popleft(), self._idle.popleft()
            references = job.call(actor)
            self._running[references[0]] = (job, references, actor)

    def _advance(self) -> None:
        """Wait for the next call, or for an actor that comes back."""
        ready = self._next_ready()
        if ready in self._returning:
            self._idle.extend(self._back(ready))
        else:
            job, references, actor = self._running.pop(ready)
            try:
                job.value = result(ready)
                job.rest, job.done = references[1:], True
                self._idle.append(actor)
            except LOST as error:
                job.attempts += 1
                self._lost(error, job.attempts)
                self._waiting.appendleft(job)
                self._revive(actor, error)
        self._start()

    def _next_ready(self) -> ray.ObjectRef:
        pending = [*self._running, *self._returning]
        if not pending:
            raise RunError("every client actor is lost for good")
        timeout = None if self._running else self._start_timeout_s
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout, fetch_local=True)
        if not ready:
            raise RunError(f"no client actor came back within {timeout:g} s after it was lost")
        return ready[0]

    def _back(self, opened: ray.ObjectRef) -> list[Any]:
        """Return the actor that is back, none if it was lost again."""
        actor = self._returning.pop(opened)
        try:
            result(opened)
        except LOST as error:
            # Ray refuses calls for the seconds that a restart takes; do not ask in a tight loop.
            time.sleep(_RESTART_POLL_S)
            self._revive(actor, error)
            return []
        return [actor]

    def _revive(self, actor: Any, error: Exception) -> None:
        """Wait in the background for an actor that Ray restarts; forget one it does not."""
        if not isinstance(error, ActorDiedError):
            self._returning[self._reopen(actor)] = actor

    def _lost(self, error: Exception, attempts: int) -> None:
        reason = str(error).strip().splitlines()[0]
        if attempts >= ATTEMPTS:
            raise RunError(f"the same work lost {attempts} actors one after another: {reason}")
        self._note(f"a client actor was lost and its work is run again: {reason}")


def result(reference: ray.ObjectRef) -> Any:
    """Return a call's result; raise the user's errors as they were, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (RayfedError, NotOpenError)):
            raise cause from None
        raise RunError(f"a worker failed:\n{error}") from error
