"""Start a run, watch it, bring its result home. Source: this project."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed_lora.engines.factory import Factory, TorchFactory, in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import (
    BadInputError,
    RayfedError,
    ResourceError,
    RunError,
)
from rayfed_lora.jobs import progress as job_progress
from rayfed_lora.jobs.ports import unreachable_cluster
from rayfed_lora.jobs.token_file import keep_token_private
from rayfed_lora.pages.report import run_page
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.claiming import claim, claimed, complete
from rayfed_lora.runs.location import run_location, with_absolute_paths
from rayfed_lora.runs.ownership import Lease, Ticket
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder

if TYPE_CHECKING:
    import pandas as pd
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "rayfed_lora"
# Each poll is work for server and driver, on cores that clients need.
_POLL_S = 0.5
_ANSWER_S = 30.0
# How long a run that is stopped may take to save its rounds.
_SAVE_S = 120.0
_STOPPING = (signal.SIGINT, signal.SIGTERM)
# Set before a Ray of our own starts; a value that the user has set stays.
_OWN_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    # Nobody asks a Ray that lives as long as its run; collecting took a hundredth of a core.
    "RAY_enable_metrics_collection": "0",
    # Bytes up to which a result comes with the answer to its call (Ray: 100 kB). Larger ones go by
    # the object store: 1.5 ms later on two cores that were busy.
    "RAY_max_direct_call_object_size": str(1 << 19),
}


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        location: its run folder.
        summary: content of summary.json.
    """

    location: str
    summary: Mapping[str, Any]

    @property
    def rounds(self) -> pd.DataFrame:
        """One row a round: rounds.parquet; raises RunFolderError where it is damaged."""
        return self._table("rounds.parquet")

    @property
    def clients(self) -> pd.DataFrame:
        """One row a client and round: clients.parquet; raises as `rounds` does."""
        return self._table("clients.parquet")

    def _table(self, name: str) -> pd.DataFrame:
        from rayfed_lora.runs.checked import table

        frame: pd.DataFrame = table(RunFolder(self.location), name).to_pandas()
        return frame


@dataclass(frozen=True)
class Started:
    """A detached run: it goes on in the cluster under this actor name."""

    location: str
    actor: str


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    watch: Callable[[Status], None] | None = None,
    factory: Factory | None = None,
) -> Result:
    """Run a recipe to its end and return the result.

    SIGINT or SIGTERM stops it cleanly: the round is abandoned, the finished ones are saved. A
    second one ends it at once.

    Args:
        recipe: from `load_recipe` or Python's own call, or a shipped name, a path or a mapping; its
            values are checked here, whatever it is.
        out: run folder or URI; default `storage.path`, or a new one under `runs/`.
        resume: go on with the run in `out`.
        address: of a running Ray cluster; default $RAY_ADDRESS, or a Ray of our own.
        watch: called with the status from time to time; records and notes only once each.
        factory: what workers make of the recipe; for tests.

    Raises:
        BadInputError: refused before anything started.
        InterruptedRunError: stopped by a signal.
        RunError: the run failed; the last checkpoint is kept.
    """
    recipe = with_absolute_paths(load_recipe(recipe))
    refuse_address(recipe, address)
    location = run_location(out or recipe.storage.path, recipe.name)
    folder = RunFolder(location)
    claim(folder, recipe, resume)
    done = complete(folder) if resume else None
    if done is not None:
        return Result(location, done)
    factory = factory or TorchFactory()
    watch = watch or (lambda status: None)
    with claimed(folder, recipe, resume) as lease:
        if recipe.runtime.executor == "local":
            summary = _run_here(recipe, folder, resume, watch, factory, lease.ticket)
        else:
            summary = _run_on_ray(recipe, folder, resume, watch, factory, lease.ticket, address)
        return Result(location, summary)


def _run_on_ray(
    recipe: Recipe,
    folder: RunFolder,
    resume: bool,
    watch: Callable[[Status], None],
    factory: Factory,
    ticket: Ticket,
    address: str | None,
) -> dict[str, Any]:
    with ray_session(address):
        server, _ = _start_server(recipe, folder, resume, factory, None, ticket)
        seen = folder.location if folder.local is None else str(folder.local)
        with job_progress.told(recipe, seen, watch) as tell:
            return _follow(server, tell)


def refuse_address(recipe: Recipe, address: str | None) -> None:
    """Check that no cluster is named for a run that uses none.

    Raises:
        BadInputError: one is.
    """
    if address is not None and recipe.runtime.executor == "local":
        raise BadInputError(
            f"--address: expected none with runtime.executor local, which runs in this process; got"
            f" {address!r}; runtime.executor ray runs on a cluster"
        )


def start(
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> Started:
    """Start a run in a cluster and return at once; it survives this process.

    Args:
        recipe: as for `run`.
        out: run folder or URI that the cluster's nodes can reach.
        resume: go on with the run in `out`.
        address: of the cluster; default $RAY_ADDRESS.

    Raises:
        BadInputError: no cluster is named, or the run was refused.
    """
    recipe = with_absolute_paths(load_recipe(recipe))
    if recipe.runtime.executor != "ray" or (address or os.environ.get("RAY_ADDRESS")) is None:
        raise BadInputError(
            "--detach needs executor ray and a running cluster: give --address (or RAY_ADDRESS);"
            " a cluster on this machine is started by `ray start --head`"
        )
    location = run_location(out or recipe.storage.path, recipe.name)
    folder = RunFolder(location)
    claim(folder, recipe, resume)

    with claimed(folder, recipe, resume) as lease, ray_session(address):
        ticket = lease.ticket.detached()
        server, name = _start_server(recipe, folder, resume, TorchFactory(), "detached", ticket)
        _wait_for_handover(server, lease)
        return Started(location, name)


def _wait_for_handover(server: Any, lease: Lease) -> None:
    """Wait until a detached server owns its run folder: from then on it runs without us."""
    import ray

    deadline = time.monotonic() + _ANSWER_S
    while not ray.get(server.status.remote()).over:
        if lease.handed_over():
            return
        if time.monotonic() > deadline:
            # The server takes the folder by its ticket whenever it comes to it.
            lease.keep()
            return
        time.sleep(_POLL_S)


def _run_here(
    recipe: Recipe,
    folder: RunFolder,
    resume: bool,
    watch: Callable[[Status], None],
    factory: Factory,
    ticket: Ticket,
) -> dict[str, Any]:
    device = local_device(recipe)
    executor = LocalEngine(lambda: in_process(recipe, factory, device))
    board = StatusBoard(recipe.annealing.total_rounds, watch)
    stop = threading.Event()
    with interruptible(stop.set):
        return simulate(
            recipe,
            executor,
            folder,
            board,
            stop.is_set,
            resume=resume,
            page=run_page,
            ticket=ticket,
        )


def local_device(recipe: Recipe) -> str:
    """Return the torch device of a run in this process.

    Raises:
        ResourceError: the recipe wants a GPU, and torch sees none.
    """
    if recipe.runtime.device != "cuda":
        return "cpu"
    from rayfed_lora.training.device import has_gpu

    if not has_gpu():
        raise ResourceError("runtime.device 'cuda': torch sees no GPU on this machine")
    return "cuda:0"


@contextmanager
def interruptible(stop: Callable[[], object]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM call `stop`; a second one raises KeyboardInterrupt.

    SIGTERM is how Ray stops a job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        stop()

    before = {number: signal.signal(number, on_signal) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start a Ray of our own for the time of the run."""
    where = address or os.environ.get("RAY_ADDRESS")
    if where is None:
        for name, value in _OWN_RAY.items():
            # Read when Ray is imported: set later, it would hold for the processes that Ray
            # starts, and not for this one.
            if name != "RAY_AUTH_MODE" or "ray" not in sys.modules:
                os.environ.setdefault(name, value)
    reason = None if where is None else unreachable_cluster(where)
    if reason is not None:
        raise ResourceError(f"no Ray cluster at {where}: {reason}")
    import ray

    if ray.is_initialized():
        yield
        return
    if where is None:
        keep_token_private()
    try:
        ray.init(
            address=where or "local",
            namespace=NAMESPACE,
            logging_level="ERROR",
            log_to_driver=False,
            **({} if where else {"include_dashboard": False}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(f"no Ray cluster at {where or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_server(
    recipe: Recipe,
    folder: RunFolder,
    resume: bool,
    factory: Factory,
    lifetime: str | None,
    ticket: Ticket | None = None,
) -> tuple[Any, str]:
    import ray

    from rayfed_lora.launching.simulation_server import SimulationServer

    location = folder.location if folder.local is None else str(folder.local)
    name = f"rayfed-lora {location}"
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": lifetime,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 2,
        "scheduling_strategy": on_this_node(),
    }
    _make_way(name)
    try:
        server = ray.remote(SimulationServer).options(**options)
        detached = lifetime == "detached"
        return server.remote(recipe, location, resume, factory, detached, ticket), name
    except ValueError as error:
        raise BadInputError(
            f"a run into {location} is going on in this cluster: {error}"
        ) from error


def _make_way(name: str) -> None:
    """End the server of a detached run that is over: it still answers, under its name."""
    import ray
    from ray.exceptions import RayError

    # There is no such actor, or it does not answer: it is being started again, and goes on.
    with suppress(ValueError, RayError):
        server = ray.get_actor(name, NAMESPACE)
        if ray.get(server.status.remote(), timeout=_ANSWER_S).over:
            ray.kill(server)
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline and ray.get_actor(name, NAMESPACE) is not None:
                time.sleep(_POLL_S)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy of a server that writes folders which were claimed here.

    A local path may be another folder on another node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def _follow(server: Any, watch: Callable[[Status], None]) -> dict[str, Any]:
    """Wait for the run, showing its status; pass signals to stop on."""
    import ray

    result = server.run.remote()
    records, notes, board = 0, 0, ""
    stop, told = threading.Event(), False
    with ended_with_us(server, result), interruptible(stop.set):
        while True:
            ready, _ = ray.wait([result], timeout=_POLL_S)
            if stop.is_set() and not told:
                server.stop.remote()
                told = True
            with unwrapped_errors():
                status: Status = ray.get(server.status.remote(records, notes))
                if status.board != board:
                    # Of a server that Ray has started again, or the first one.
                    records, notes, board = 0, 0, status.board
                    status = ray.get(server.status.remote())
                records = status.rounds_done - status.rounds_before
                notes += len(status.notes)
                watch(status)
                if ready:
                    summary: dict[str, Any] = ray.get(result)
                    return summary


@contextmanager
def ended_with_us(server: Any, result: Any) -> Iterator[None]:
    """End a run and its driver actor where following it fails: Ray itself may go on.

    Args:
        server: actor handle, with a method `stop`.
        result: of its method `run`.

    An error, such as one of the user's `watch`, lets the run save its rounds first; a second signal
    does not.
    """
    import ray

    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not ray.wait([result], timeout=0)[0]:
            # Waited for: Ray complains of calls that are under way when an actor is killed.
            ray.wait([server.stop.remote()], timeout=_ANSWER_S)
            ray.wait([result], timeout=_SAVE_S)
        ray.kill(server)
        raise


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raise what a driver actor raised as it was, and all else of Ray's as a RunError."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RayfedError):
            raise error.cause from None
        raise RunError(f"the server failed:\n{error}") from error
    except RayError as error:
        raise RunError(f"the server was lost: {error}") from error
