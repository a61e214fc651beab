"""Calls of client actors, as a pool keeps them. Source: this project."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
)

from rayfed_lora.engines.on_ray.actors import NotOpenError
from rayfed_lora.errors import RayfedError, RunError

LOST = (ActorDiedError, ActorUnavailableError, OutOfMemoryError, NotOpenError)


class PartsLostError(RunError):
    """What a call was to work on, other calls' results, was lost with the node that held it."""


@dataclass(frozen=True)
class Work:
    """A call of an actor's method.

    Attributes:
        name: what a message to the user calls it.
        method: of the actor; takes `halvings` too, the times to halve blocks, memory being short.
        args: of the call.
        options: Ray's own, of the call.
        limited: whether `block_timeout_s` holds for it.
        clients: number of clients that it trains.
        units: number of pieces that a count of repeated work counts.
    """

    name: str
    method: str
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    limited: bool = False
    clients: int = 0
    units: int = 1


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
    def reruns(self) -> int:
        """How often it was begun again."""
        return max(self.begun - 1, 0)


@dataclass(eq=False)
class Worker:
    """An actor and what it has been sent, in the order in which it does it.

    Attributes:
        actor: its handle.
        at_once: how many calls it does at once.
        jobs: the first of them are being done.
    """

    actor: Any
    at_once: int
    jobs: list[Job] = field(default_factory=list)

    @property
    def doing(self) -> list[Job]:
        """What it does now."""
        return self.jobs[: self.at_once]

    @property
    def limited(self) -> list[Job]:
        """What it does now and may not take for ever."""
        return [job for job in self.doing if job.work.limited]

    def late(self, limit_s: float) -> list[Job]:
        """Return what has taken too long."""
        now = time.monotonic()
        return [job for job in self.limited if now - job.since >= limit_s]

    def add(self, job: Job) -> None:
        """Note that it was sent a job."""
        self.jobs.append(job)
        job.since = time.monotonic()

    def remove(self, job: Job) -> None:
        """Note that a job is over: the next one that waited is begun."""
        self.jobs.remove(job)
        for next_one in self.jobs[self.at_once - 1 : self.at_once]:
            next_one.since = time.monotonic()


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
