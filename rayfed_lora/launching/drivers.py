"""Driver actors: their start, their following, their handover. Source: this project."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfed_lora.errors import BadInputError, RayfedError, RunError
from rayfed_lora.launching.ray_health import RayHealth
from rayfed_lora.launching.ray_session import NAMESPACE, RayLostError
from rayfed_lora.launching.simulation_server import SimulationServer
from rayfed_lora.launching.this_process import interruptible
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.ownership import Lease
from rayfed_lora.runs.status import Status

# Each poll costs the driver CPU time that clients need.
_POLL_S = 0.5
_ANSWER_S = 30.0
# A driver that dies in each of its starts must end some time; each restart resumes the run.
_MOST_RESTARTS = 20
# How long a stopped run may take to save its rounds.
_SAVE_S = 120.0


def driver_class(kind: type, **options: Any) -> Any:
    """Return the Ray actor class of a driver, with one thread for its run and one for questions.

    The actor starts on this node if possible: it writes folders that were claimed here, and a local
    path may be another folder on another node.
    """
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    shared = {"num_cpus": 0, "max_concurrency": 2, "scheduling_strategy": node}
    return ray.remote(kind).options(**shared, **options)


def start_server(
    recipe: Recipe, location: str, *, detached: bool = False, **options: Any
) -> tuple[Any, str]:
    """Start the driver actor of a run.

    Args: as for `SimulationServer`. A detached run starts at once and survives this process.

    Returns:
        The actor's handle and its name, which is unique to the run folder.

    Raises:
        BadInputError: a run into the same folder is active in this cluster.
    """
    name = f"rayfed-lora {location}"
    _end_finished(name)
    lifetime = "detached" if detached else None
    again = {"max_restarts": _MOST_RESTARTS, "max_task_retries": -1}
    driver = driver_class(
        SimulationServer, name=name, namespace=NAMESPACE, lifetime=lifetime, **again
    )
    try:
        return driver.remote(recipe, location, detached=detached, **options), name
    except ValueError as error:
        message = f"a run into {location} is active in this cluster: {error}"
        raise BadInputError(message) from error


def _end_finished(name: str) -> None:
    """End the driver of a finished detached run, which still answers under its name."""
    # No such actor, or no answer: Ray is restarting the actor, and its run continues.
    with suppress(ValueError, RayError):
        server = ray.get_actor(name, NAMESPACE)
        if ray.get(server.status.remote(), timeout=_ANSWER_S).over:
            ray.kill(server)
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline and ray.get_actor(name, NAMESPACE) is not None:
                time.sleep(_POLL_S)


def wait_for_handover(server: Any, lease: Lease) -> None:
    """Wait until a detached driver owns its run folder and no longer needs this process."""
    deadline = time.monotonic() + _ANSWER_S
    while not ray.get(server.status.remote()).over:
        if lease.handed_over():
            return
        if time.monotonic() > deadline:
            # The driver takes over the folder by its ticket later.
            lease.keep()
            return
        time.sleep(_POLL_S)


def follow(server: Any, poll: Callable[[], None], resume: str) -> Any:
    """Start a driver's `run`, wait for it and return its result.

    `poll` is called about twice a second, and once more after the end. The first SIGINT or SIGTERM
    calls the driver's `stop`. `resume` tells the user how to resume after a loss.

    Raises:
        RayfedError: as the driver raised it.
        RunError: the driver failed otherwise, or was lost, alone or with its Ray.
    """
    health = RayHealth(resume)
    result = server.run.remote()
    stop, forwarded = threading.Event(), False
    with _ended_on_error(server, result), interruptible(stop.set):
        while True:
            ready, _ = ray.wait([result], timeout=_POLL_S)
            if stop.is_set() and not forwarded:
                server.stop.remote()
                forwarded = True
            with _unwrapped_errors(health):
                health.check()
                poll()
                if ready:
                    return ray.get(result)


def status_poll(server: Any, watch: Callable[[Status], None]) -> Callable[[], None]:
    """Return a function that passes a driver's status on to `watch`, each record and note once."""
    records_seen, notes_seen, board = 0, 0, ""

    def poll() -> None:
        nonlocal records_seen, notes_seen, board
        status = ray.get(server.status.remote(records_seen, notes_seen))
        if status.board != board:
            # The first poll, or Ray has restarted the driver: its board counts from 0.
            notes_seen, board = 0, status.board
            status = ray.get(server.status.remote())
        records_seen = status.rounds_done - status.rounds_before
        notes_seen += len(status.notes)
        watch(status)

    return poll


@contextmanager
def _ended_on_error(server: Any, result: Any) -> Iterator[None]:
    """End a driver and its run on any error of this process: Ray itself may continue.

    After an error, such as one of the user's `watch`, the run may save its rounds first; after a
    second signal it may not.
    """
    try:
        yield
    except RayLostError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) and not ray.wait([result], timeout=0)[0]:
            # Ray warns of calls that are unfinished when their actor is killed.
            ray.wait([server.stop.remote()], timeout=_ANSWER_S)
            ray.wait([result], timeout=_SAVE_S)
        ray.kill(server)
        raise


@contextmanager
def _unwrapped_errors(health: RayHealth) -> Iterator[None]:
    """Raise a driver's own RayfedError as it is, and any other error of Ray as a RunError."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RayfedError):
            raise error.cause from None
        raise RunError(f"the server failed:\n{error}") from error
    except RayError as error:
        health.check()
        # Ray indents ids and names.
        lines = [line for line in str(error).splitlines() if line and not line.startswith("\t")]
        raise RunError(f"the server was lost: {' '.join(lines)} {health.hint}") from error
