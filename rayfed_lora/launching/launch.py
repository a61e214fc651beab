"""Runs one recipe, in this process or on Ray, and returns its result. Source: this project."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.errors import BadInputError
from rayfed_lora.jobs.reporting import reporting
from rayfed_lora.launching import harness
from rayfed_lora.launching.in_memory import (
    check_held,
    data_settings,
    refuse_held,
    with_held,
)
from rayfed_lora.launching.ray_session import ray_session
from rayfed_lora.launching.result import Result
from rayfed_lora.launching.this_process import absolute, interruptible, local_engine, refuse_address
from rayfed_lora.pages.run_page import run_page
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.callbacks import Callback
from rayfed_lora.runs.claiming import claim, claimed, complete
from rayfed_lora.runs.location import with_absolute_paths
from rayfed_lora.runs.resuming import recipe_and_place
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Started:
    """A detached run: it continues in the cluster under this actor name."""

    location: str
    actor: str


def run(  # noqa: PLR0913 - the user-facing API
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    watch: Callable[[Status], None] | None = None,
    plugins: Sequence[Any] = (),
    accept_changed_plugins: bool = False,
    callbacks: Sequence[Callback] = (),
    data: Any = None,
    factory: Factory | None = None,
) -> Result:
    """Run a recipe to its end and return the result.

    The first SIGINT or SIGTERM abandons the current round and saves the finished ones. A second one
    ends the run at once.

    Args:
        recipe: a `Recipe`, a shipped name, a path or a mapping; its values are checked here. With
            `resume` also the folder or URI of a run, which is continued by its stored recipe.
        out: run folder or URI; default `storage.path`, or a new one under `runs/`.
        resume: continue the run in `out`, which has to exist.
        address: of a running Ray cluster; default $RAY_ADDRESS, or an own Ray.
        watch: called with the status from time to time, with each record and note once.
        plugins: own methods that may be used: names of modules, modules, and methods decorated by
            `rayfed_lora.plugins`; one with options, or an instance, is chosen too.
        callbacks: called with each `FinishedRound`, on Ray in the driver actor; a true return ends
            the run after a tested round, and its model is exported as usual.
        data: rows in place of `data.source`: a pandas DataFrame, a `datasets.Dataset`, a pyarrow
            Table, or (train, test) of them. The recipe keeps their hash: to resume, hand over the
            same ones.
        accept_changed_plugins: continue though the code of own methods has changed; recorded.
        factory: builds workload and trainers in the workers; for tests.

    Raises:
        BadInputError: rejected before anything started.
        InterruptedRunError: stopped by a signal.
        RunError: the run failed; the last checkpoint is kept.
    """
    settings = data_settings(data)
    recipe, location = recipe_and_place(recipe, out, resume, settings, plugins)
    recipe = with_absolute_paths(recipe)
    refuse_address(recipe, address)
    folder = RunFolder(location)
    claim(folder, recipe, resume, accept_changed_plugins=accept_changed_plugins)
    done = complete(folder, recipe) if resume else None
    if not harness.has_results(folder):
        harness.check_recipes([recipe])
    if done is not None:
        harness.test(recipe, location)
        return Result(location, done)
    check_held([recipe])
    watch, factory = watch or (lambda status: None), factory or TorchFactory()
    with claimed(folder, recipe, resume) as lease:
        ticket = lease.ticket
        if recipe.runtime.executor == "local":
            board, stop = StatusBoard(recipe.annealing.total_rounds, watch), threading.Event()
            engine = local_engine(recipe, factory)
            with interruptible(stop.set):
                summary = simulate(
                    recipe,
                    engine,
                    folder,
                    board,
                    stop.is_set,
                    resume=resume,
                    page=run_page,
                    ticket=ticket,
                    callbacks=callbacks,
                )
            harness.test(recipe, location)
            return Result(location, summary)
        where = absolute(folder)
        watch(Status(step="starting Ray", rounds=recipe.annealing.total_rounds))
        with ray_session(address), reporting(recipe, where, watch) as report:
            # After `ray_session`: Ray reads its settings at import.
            from rayfed_lora.launching.drivers import follow, start_server, status_poll

            factory = with_held(factory, [recipe])
            server, _ = start_server(
                recipe, where, resume=resume, factory=factory, ticket=ticket, callbacks=callbacks
            )
            again = f"resume with --resume --out {shlex.quote(location)}"
            result = Result(location, follow(server, status_poll(server, report), again))
        harness.test(recipe, location)
        return result


def start(
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    plugins: Sequence[Any] = (),
) -> Started:
    """Start a run in a cluster and return at once; the run survives this process.

    Arguments as for `run`; the cluster's nodes can reach `out`.

    Raises:
        BadInputError: no cluster is named, or the run is rejected.
    """
    recipe, location = recipe_and_place(recipe, out, resume, plugins=plugins)
    recipe = with_absolute_paths(recipe)
    if recipe.runtime.executor != "ray" or (address or os.environ.get("RAY_ADDRESS")) is None:
        raise BadInputError(
            "--detach needs executor ray and a running cluster: give --address (or RAY_ADDRESS);"
            " a cluster on this machine is started by `ray start --head`"
        )
    refuse_held(recipe, "--detach")
    harness.refuse(recipe, "--detach")
    folder = RunFolder(location)
    claim(folder, recipe, resume)
    with claimed(folder, recipe, resume) as lease, ray_session(address):
        from rayfed_lora.launching.drivers import start_server, wait_for_handover

        where, ticket = absolute(folder), lease.ticket.detached()
        server, name = start_server(recipe, where, detached=True, resume=resume, ticket=ticket)
        wait_for_handover(server, lease)
        return Started(location, name)
