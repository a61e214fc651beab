"""Driver actors: their start, and the handover of a detached run. Source: this project."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfed_lora.errors import BadInputError
from rayfed_lora.launching.ray_session import NAMESPACE
from rayfed_lora.launching.request import RunRequest
from rayfed_lora.launching.simulation_server import SimulationServer
from rayfed_lora.runs.ownership import Lease

_POLL_S = 0.5
_ANSWER_S = 30.0


def driver_class(kind: type, **options: Any) -> Any:
    """Return the Ray actor class of a driver, with one thread for its run and one for questions.

    The actor starts on this node if possible: it writes folders that were claimed here, and a local
    path may be another folder on another node.
    """
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    driver = ray.remote(kind)
    return driver.options(num_cpus=0, max_concurrency=2, scheduling_strategy=node, **options)


def start_server(request: RunRequest, *, detached: bool = False) -> tuple[Any, str]:
    """Start the driver actor of a run.

    Args:
        request: the run; its folder is claimed.
        detached: the run starts at once and survives this process.

    Returns:
        The actor's handle and its name, which is unique to the run folder.

    Raises:
        BadInputError: a run into the same folder is active in this cluster.
    """
    request = replace(request, location=request.absolute_location)
    name = f"rayfed-lora {request.location}"
    _end_finished(name)
    driver = driver_class(
        SimulationServer,
        name=name,
        namespace=NAMESPACE,
        lifetime="detached" if detached else None,
        max_restarts=-1,
        max_task_retries=-1,
    )
    try:
        return driver.remote(request, detached), name
    except ValueError as error:
        raise BadInputError(
            f"a run into {request.location} is active in this cluster: {error}"
        ) from error


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
