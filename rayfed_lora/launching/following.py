"""Following a driver actor: its status, signals to stop, its result or error.

Source: this project.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayfed_lora.errors import RayfedError, RunError
from rayfed_lora.launching.signals import interruptible
from rayfed_lora.runs.status import Status

# Each poll costs the driver CPU time that clients need.
_POLL_S = 0.5
_ANSWER_S = 30.0
# How long a stopped run may take to save its rounds.
_SAVE_S = 120.0


def follow(server: Any, poll: Callable[[], None]) -> Any:
    """Start a driver's `run`, wait for it and return its result.

    The first SIGINT or SIGTERM calls the driver's `stop`.

    Args:
        server: actor handle, with the methods `run` and `stop`.
        poll: called about twice a second, and once more after the end.

    Raises:
        RayfedError: as the driver raised it.
        RunError: the driver failed otherwise, or was lost.
    """
    result = server.run.remote()
    stop, forwarded = threading.Event(), False
    with _ended_on_error(server, result), interruptible(stop.set):
        while True:
            ready, _ = ray.wait([result], timeout=_POLL_S)
            if stop.is_set() and not forwarded:
                server.stop.remote()
                forwarded = True
            with _unwrapped_errors():
                poll()
                if ready:
                    return ray.get(result)


class StatusFeed:
    """Passes on the status of a driver actor, each record and note once."""

    def __init__(self, server: Any, watch: Callable[[Status], None]) -> None:
        """Ask nothing yet.

        Args:
            server: actor handle, with the method `status`.
            watch: called with each status.
        """
        self._server = server
        self._watch = watch
        self._records_seen, self._notes_seen, self._board = 0, 0, ""

    def poll(self) -> None:
        """Fetch the status and pass it on."""
        status = self._fetched()
        if status.board != self._board:
            # The first poll, or Ray has restarted the driver: its board counts from 0.
            self._records_seen, self._notes_seen, self._board = 0, 0, status.board
            status = self._fetched()
        self._records_seen = status.rounds_done - status.rounds_before
        self._notes_seen += len(status.notes)
        self._watch(status)

    def _fetched(self) -> Status:
        status: Status = ray.get(self._server.status.remote(self._records_seen, self._notes_seen))
        return status


@contextmanager
def _ended_on_error(server: Any, result: Any) -> Iterator[None]:
    """End a driver and its run on any error of this process: Ray itself may continue.

    After an error, such as one of the user's `watch`, the run may save its rounds first; after a
    second signal it may not.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not ray.wait([result], timeout=0)[0]:
            # Ray warns of calls that are unfinished when their actor is killed.
            ray.wait([server.stop.remote()], timeout=_ANSWER_S)
            ray.wait([result], timeout=_SAVE_S)
        ray.kill(server)
        raise


@contextmanager
def _unwrapped_errors() -> Iterator[None]:
    """Raise a driver's own RayfedError as it is, and any other error of Ray as a RunError."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RayfedError):
            raise error.cause from None
        raise RunError(f"the server failed:\n{error}") from error
    except RayError as error:
        raise RunError(f"the server was lost: {error}") from error
