"""One run from its folder to its summary, on any engine. Source: this project."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import update_wrapper
from typing import Any, ParamSpec

from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.federation.learning_rate import rate_warning
from rayfed_lora.federation.privacy import check_privacy
from rayfed_lora.federation.sampling import attackers
from rayfed_lora.federation.server import Server
from rayfed_lora.recipe.loading import recipe_yaml
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checksums, seals
from rayfed_lora.runs.callbacks import Callback, Callbacks
from rayfed_lora.runs.checkpoints import Snapshot
from rayfed_lora.runs.claiming import inspected, lengthened
from rayfed_lora.runs.ownership import Lease, Ticket, owned
from rayfed_lora.runs.provenance import record_origins
from rayfed_lora.runs.recording import RunRecorder
from rayfed_lora.runs.restored import accepted
from rayfed_lora.runs.saving import PageWriter, Saving
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.tables import PARTITION_FILE, Tables, write_partition
from rayfed_lora.runs.trackers import Tracker, Tracking, check_tracking, trackers
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine, Population

_P = ParamSpec("_P")


def simulate_rounds(  # noqa: PLR0913 - the callers name them
    recipe: Recipe,
    engine: Engine,
    folder: RunFolder,
    board: StatusBoard,
    should_stop: Callable[[], bool],
    *,
    resume: bool,
    page: PageWriter | None = None,
    name: str | None = None,
    metrics: Tracker | None = None,
    ticket: Ticket | None = None,
    callbacks: Sequence[Callback] = (),
) -> Generator[Tables, None, dict[str, Any]]:
    """Run a recipe round by round; closed before its end, save the finished rounds.

    Args:
        recipe: the run.
        engine: not yet opened; closed in the end, whatever happens.
        folder: checked by `claim`; owned by this process until the run ends.
        board: told of every step.
        should_stop: once true, the round is abandoned and the run saved.
        resume: go on from the newest whole checkpoint where there is one.
        page: writes report.html from the folder and the summary; None: no page.
        name: what to call the run where it is shown; None: as its folder.
        metrics: told of finished rounds, beside those that the recipe asks for.
        callbacks: called with each finished round; a true return ends the run.
        ticket: of the process that has claimed the folder; None where nobody has.

    Yields:
        After each round the tables so far, the same object each time.

    Returns:
        The summary; at once where the run had been finished.

    Raises:
        InterruptedRunError: `should_stop` said so; the finished rounds are saved.
        RunFolderError: another process owns the folder.
        RayfedError: whatever else ends a run; the last checkpoint is kept.
    """
    began, told = time.perf_counter(), Callbacks(callbacks)
    tracking = Tracking([] if metrics is None else [metrics], board.note)
    with ExitStack() as stack:
        stack.enter_context(closing(engine))
        # Here too: the process that claimed the folder may be on another machine.
        check_tracking(recipe)
        check_privacy(recipe)
        own, lease = stack.enter_context(owned(folder, ticket, wait=resume, tell=board.note))
        # Before the folder is released: whoever waits for it may need the actors' resources.
        stack.enter_context(closing(engine))
        stack.enter_context(tracking.told_of_the_end())
        # Another process may have finished it while its lease was watched.
        done, damaged = inspected(own, recipe) if resume else (None, [])
        if done is not None:
            return done
        if resume:
            own.remove_scratch()
        for file in damaged:
            board.note(
                f"{file} is damaged or missing: it is written again from the last checkpoint"
            )
        board.step("loading data and model")
        population = engine.open()
        found = accepted(own, recipe, population, board.note) if resume else None
        tables = _tables(recipe, own, population)
        if found is not None:
            tables.first(found.rounds)
        _begin(own, recipe, population, board, found)
        for tracker in trackers(recipe, own, name or own.name):
            tracking.trackers.append(tracker)
        recorder = RunRecorder(
            tables, board, tracking, population.client_names, prompts=population.prompts
        )
        server = Server(recipe, engine, population, recorder, lease.or_lost(should_stop))
        for note in _notes(recipe, population, server, lease):
            board.note(note)
        saving = Saving(recipe, own, population, tables, server.ledger, began)
        run = saving.begin(found, engine)
        if found is not None:
            board.resumed(run.rounds)
            recorder.running = run.rounds
        tracking.resumed(tables.rounds)
        told.asked_by = run.selection.asked_by
        recorder.keeps = bool(told)
        with saving.on_stop():
            for after in server.rounds(run):
                selection = after.selection
                try:
                    if told:
                        ends = told.called(recorder.taken(), after.model)
                        selection = replace(selection, stopped_by=ends or selection.stopped_by)
                finally:
                    selection = replace(selection, asked_by=told.asked_by)
                    saving.offer(replace(after, selection=selection))
                yield tables
                if selection.stopped_by is not None:
                    break
        return saving.finish(engine, board, page)


def _exhausted(
    rounds: Callable[_P, Generator[Any, None, dict[str, Any]]],
) -> Callable[_P, dict[str, Any]]:
    def simulate(*args: _P.args, **options: _P.kwargs) -> dict[str, Any]:
        """Run a recipe to its end and return its summary; arguments as `simulate_rounds`."""
        left = rounds(*args, **options)
        while True:
            try:
                next(left)
            except StopIteration as end:
                summary: dict[str, Any] = end.value
                return summary

    return update_wrapper(simulate, rounds, assigned=(), updated=())


simulate = _exhausted(simulate_rounds)


def _tables(recipe: Recipe, folder: RunFolder, population: Population) -> Tables:
    malicious = attackers(recipe, population.clients) if recipe.clients.attack else None
    return Tables(
        folder,
        list(population.shape.modules),
        population.client_names,
        recipe.evaluation.columns,
        malicious,
        ClientSettings.of(recipe, population.devices).own,
    )


def _begin(
    folder: RunFolder,
    recipe: Recipe,
    population: Population,
    board: StatusBoard,
    snapshot: Snapshot | None,
) -> None:
    """Write what the folder of a run begins with, where it is missing or damaged.

    Called once data and checkpoint are accepted: a rejected run leaves its folder as it was.
    """
    # Before a recipe of another length: the summary is of the one that is there.
    checksums.withdraw(folder)
    if not folder.exists("recipe.yaml") or lengthened(folder, recipe):
        folder.write("recipe.yaml", seals.sealed_text(recipe_yaml(recipe)))
    record_origins(folder, recipe, 0 if snapshot is None else snapshot.rounds)
    # After it: a folder without a recipe is nobody's run.
    if population.label_counts is None:
        return
    invalid = seals.check(folder, PARTITION_FILE) is not None
    if invalid and folder.exists(PARTITION_FILE):
        board.note(f"{PARTITION_FILE} had no valid checksum and is written again")
    # Without a checkpoint the run starts from the data as they are now.
    if invalid or snapshot is None:
        names = population.label_names, population.client_names
        write_partition(folder, *population.label_counts, *names)


def _notes(recipe: Recipe, population: Population, server: Server, lease: Lease) -> list[str]:
    """Return what the user should know before the first round."""
    found = [*population.notes, *unused(recipe)]
    if lease.files.note is not None:
        found.insert(0, lease.files.note)
    if population.shape.obstacle is not None and recipe.annealing.mode != "full":
        found.insert(0, f"clients are trained {server.clients.block_size.reason}")
    doubtful = rate_warning(recipe)
    return found if doubtful is None else [*found, doubtful]
