"""One run from its folder to its summary, on any executor.

Source: this project (design.md, "The run folder").
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rayfed_lora.client_names import client_label
from rayfed_lora.errors import ClientError, InterruptedRunError, RunFolderError
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.executor import Executor, Population
from rayfed_lora.federation.learning_rate import doubt
from rayfed_lora.federation.progress import Progress, Timing
from rayfed_lora.federation.server import Server
from rayfed_lora.federation.transitions import GlobalModel
from rayfed_lora.lora.fingerprint import sha256
from rayfed_lora.recipe.loading import recipe_yaml
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints, checksums, restored, seals
from rayfed_lora.runs.checkpoints import CheckpointWriter, Snapshot
from rayfed_lora.runs.claiming import inspected
from rayfed_lora.runs.ownership import Ticket, take
from rayfed_lora.runs.reading import REPORT_FILE
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.summary import client_summary, summary
from rayfed_lora.runs.tables import PARTITION_FILE, Tables, write_partition
from rayfed_lora.runs.trackers import trackers
from rayfed_lora.runs.tracking import Outcome, Tracker, Tracking, check_tracking
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import ClientRecord, ClientTest, ClientUpdate, RoundPlan, RoundRecord

# Makes a run's page from its folder and its summary.
PageWriter = Callable[[RunFolder, Mapping[str, Any]], str]


def simulate(  # noqa: PLR0913 - the callers name them
    recipe: Recipe,
    executor: Executor,
    folder: RunFolder,
    board: StatusBoard,
    should_stop: Callable[[], bool],
    *,
    resume: bool,
    page: PageWriter | None = None,
    name: str | None = None,
    metrics: Tracker | None = None,
    ticket: Ticket | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end, or go on with it, and return its summary.

    Args: as for `sitting`.

    Raises:
        InterruptedRunError: `should_stop` said so; the finished rounds are saved.
        RayfedError: whatever else ends a run; the last checkpoint is kept.
    """
    rounds = sitting(
        recipe,
        executor,
        folder,
        board,
        should_stop,
        resume=resume,
        page=page,
        name=name,
        metrics=metrics,
        ticket=ticket,
    )
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            summary: dict[str, Any] = end.value
            return summary


def sitting(  # noqa: PLR0913 - the callers name them
    recipe: Recipe,
    executor: Executor,
    folder: RunFolder,
    board: StatusBoard,
    should_stop: Callable[[], bool],
    *,
    resume: bool,
    page: PageWriter | None = None,
    name: str | None = None,
    metrics: Tracker | None = None,
    ticket: Ticket | None = None,
) -> Generator[Tables, None, dict[str, Any]]:
    """Run a recipe round by round.

    Closed before its end, it saves the finished rounds.

    Args:
        recipe: the run.
        executor: not yet opened; closed in the end, whatever happens.
        folder: checked by `claim`; owned by this process until the run ends.
        board: told of every step.
        should_stop: once true, the round is abandoned and the run saved.
        resume: go on from the newest whole checkpoint where there is one.
        page: writes report.html from the folder and the summary; None: no page.
        name: what to call the run where it is shown; None: as its folder.
        metrics: told of finished rounds, beside those that the recipe asks for.
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
    began = time.perf_counter()
    # Here too: the one who claimed the folder may be on another machine.
    check_tracking(recipe)
    try:
        lease = take(folder, ticket, wait=resume, tell=board.note)
    except BaseException:
        executor.close()
        raise
    folder = folder.guarded(lease.check)
    tracking = Tracking([] if metrics is None else [metrics], board.note)
    outcome: Outcome = "failed"
    try:
        # Another process may have finished it while its lease was watched.
        done, damaged = inspected(folder) if resume else (None, [])
        if done is not None:
            outcome = "done"
            return done
        for file in damaged:
            board.note(
                f"{file} is damaged or missing: it is written again from the last checkpoint"
            )
        population = executor.open()
        stops = lease.or_lost(should_stop)
        run = _Sitting(recipe, executor, folder, board, tracking, stops, population)
        snapshot = run.accepted() if resume else None
        _begin(folder, recipe, population, board, snapshot)
        for tracker in trackers(recipe, folder, name or folder.name):
            tracking.add(tracker)
        if lease.note is not None:
            board.note(lease.note)
        yield from run.rounds(began, snapshot)
        summary = run.finish(began, page)
        outcome = "done"
        return summary
    except (InterruptedRunError, GeneratorExit):
        outcome = "stopped"
        if lease.lost:
            # It was not the user that stopped the run.
            lease.check()
        raise
    finally:
        try:
            tracking.close(outcome)
            executor.close()
        finally:
            lease.release()


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
    if not folder.exists("recipe.yaml"):
        folder.write("recipe.yaml", seals.sealed_text(recipe_yaml(recipe)))
    checksums.withdraw(folder)
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


def _finite(value: Any) -> Any:
    """Return JSON values with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Sitting:
    """One process's share of a run: from a checkpoint, or the start, to the end or a stop."""

    def __init__(
        self,
        recipe: Recipe,
        executor: Executor,
        folder: RunFolder,
        board: StatusBoard,
        tracking: Tracking,
        should_stop: Callable[[], bool],
        population: Population,
    ) -> None:
        self._recipe = recipe
        self._executor = executor
        self._folder = folder
        self._board = board
        self._tracking = tracking
        self._population = population
        # The round that is running, and how many notes stand in the tables.
        self._running, self._notes_seen = 0, 0
        self._checkpoints = CheckpointWriter(folder, recipe.storage.keep)
        self._tables = Tables(folder, list(population.shape.modules), population.client_names)
        self._server = Server(recipe, executor, population, self, should_stop)
        if population.shape.obstacle is not None and recipe.annealing.mode != "full":
            board.note(f"clients are trained {self._server.block_size.reason}")
        for note in (*population.notes, *unused(recipe)):
            board.note(note)
        doubtful = doubt(recipe)
        if doubtful is not None:
            board.note(doubtful)

    def round_started(self, plan: RoundPlan, cohort: tuple[int, ...]) -> None:
        self._keep_notes()
        self._running = plan.round
        self._board.round_started(plan, cohort)

    def clients_done(self, updates: Sequence[ClientUpdate]) -> None:
        for update in updates:
            if update.error is not None:
                name = client_label(update.client, self._population.client_names)
                self._board.note(f"{name} failed: {update.error}")
            if update.note is not None:
                self._board.note(update.note)
        self._board.clients_done(len(updates))

    def clients_tested(self, tests: list[ClientTest]) -> None:
        self._tables.add_tests(tests)

    def round_done(
        self, record: RoundRecord, clients: list[ClientRecord], aggregation_s: float
    ) -> None:
        self._tables.add(record, clients)
        self._keep_notes()
        self._board.round_done(record, clients)
        self._tracking.round_done(record, clients, aggregation_s)

    def _keep_notes(self) -> None:
        notes = self._board.status(notes_seen=self._notes_seen).notes
        self._tables.add_notes(self._running, notes)
        self._notes_seen += len(notes)

    def accepted(self) -> Snapshot | None:
        """Return the checkpoint that the run goes on from, None where there is none.

        Writes nothing.

        Raises:
            RunFolderError: the checkpoints are damaged, or do not belong to these data.
        """
        snapshot = checkpoints.newest(self._folder, self._board.note)
        if snapshot is None:
            return None
        changed = restored.changed_data(snapshot, self._population)
        if changed is not None:
            raise RunFolderError(
                f"cannot go on from the checkpoint of round {snapshot.rounds} in"
                f" {self._folder.location}: {changed}; start anew with another --out"
            )
        with self._readable(snapshot):
            restored.check(snapshot, self._recipe, self._population)
        return snapshot

    @contextmanager
    def _readable(self, snapshot: Snapshot) -> Iterator[None]:
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"cannot go on from the checkpoint of round {snapshot.rounds} in"
                f" {self._folder.location}: {type(error).__name__}: {error}"
            ) from error

    def rounds(self, began: float, snapshot: Snapshot | None) -> Generator[Tables, None, None]:
        start = self._begun() if snapshot is None else self._gone_on(snapshot)
        self._tracking.resumed(self._tables.rounds)
        self._earlier = start.timing
        startup_s = start.timing.startup_s + time.perf_counter() - began
        self._progress = replace(start, timing=replace(start.timing, startup_s=startup_s))
        self._saved = self._running = self._progress.rounds
        try:
            for self._progress in self._server.rounds(self._progress):  # noqa: B020 - the run so far
                if self._progress.rounds % self._recipe.storage.checkpoint_every == 0:
                    self._save(began)
                yield self._tables
        except ClientError as error:
            name = client_label(error.client, self._population.client_names)
            raise ClientError(error.client, error.round_index, error.trace, name) from error
        except (InterruptedRunError, GeneratorExit) as stop:
            self._save(began)
            if isinstance(stop, GeneratorExit):
                raise
            raise InterruptedRunError(
                f"stopped with {self._progress.rounds} of {self._recipe.annealing.total_rounds}"
                f" rounds done; go on with --resume --out {shlex.quote(self._folder.location)}"
            ) from stop

    def finish(self, began: float, page: PageWriter | None) -> dict[str, Any]:
        self._save(began)
        self._board.phase("exporting")
        progress, model = self._progress, self._progress.model
        exported = self._executor.export(model.state, model.base, model.trainable)
        for name, content in exported.items():
            self._folder.write(name, content)
        # What follows needs no actors, and their memory may be others'.
        self._executor.close()
        wall_s = self._earlier.wall_s + time.perf_counter() - began
        result = summary(
            self._recipe,
            self._tables.rounds,
            self._server.ledger.totals,
            replace(progress.timing, wall_s=wall_s),
            sha256(model.state, model.base),
        )
        tests = self._tables.last_tests(progress.rounds - 1)
        if tests.num_rows > 0:
            result["clients"] = client_summary(tests)
        result["labels"] = list(self._population.label_names)
        if page is not None:
            self._report(page, result)
        result[checksums.CHECKSUMS_KEY] = checksums.SUMS_FILE
        content = json.dumps(_finite(result), indent=1, allow_nan=False).encode()
        self._list_files({**exported, checksums.SUMMARY_FILE: content})
        # Last: a folder with a summary is a finished run.
        self._folder.write(checksums.SUMMARY_FILE, content)
        self._board.phase("done")
        return result

    def _list_files(self, contents: Mapping[str, bytes]) -> None:
        """Write SHA256SUMS: of these contents, and of what the folder has already."""
        sums = {name: checksums.sha256(content) for name, content in contents.items()}
        sums["recipe.yaml"] = checksums.sha256(self._folder.read("recipe.yaml"))
        tables = [*self._tables.rows(self._progress.rounds), PARTITION_FILE]
        for name in tables:
            if name != PARTITION_FILE or self._folder.exists(name):
                sums[name] = checksums.table_sha256(self._folder, name)
        checksums.write(self._folder, sums)

    def _report(self, page: PageWriter, result: Mapping[str, Any]) -> None:
        try:
            content = page(self._folder, result)
        except Exception as error:  # whatever it is, the run is done, and a page can be made again
            self._board.note(f"no {REPORT_FILE} ({error}); rayfed-lora report makes one")
        else:
            self._folder.write(REPORT_FILE, content.encode())

    def _save(self, began: float) -> None:
        """Save the rounds that are not yet saved: a checkpoint is never written a second time.

        Tables go first: a checkpoint never knows of a round that they lack.
        """
        progress = self._progress
        if progress.rounds == self._saved:
            return
        self._tables.save()
        ledger, held = self._server.ledger.snapshot()
        wall_s = self._earlier.wall_s + time.perf_counter() - began
        facts = {
            "rank": progress.rank,
            "trainable": progress.model.trainable,
            "validation": None if progress.validation is None else asdict(progress.validation),
            "best_at_heating": progress.best_at_heating,
            "timing": asdict(replace(progress.timing, wall_s=wall_s)),
            "ledger": ledger,
            "clock_s": progress.clock_s,
            "tables": self._tables.rows(progress.rounds),
            "data": dict(self._population.fingerprint),
        }
        model = progress.model
        snapshot = Snapshot(
            rounds=progress.rounds,
            state=model.state,
            base=model.base,
            held=held,
            facts=facts,
            moments=progress.moments,
            personal=progress.personal,
        )
        self._checkpoints.write(snapshot)
        self._saved = progress.rounds

    def _begun(self) -> Progress:
        self._tables.begin()
        return self._server.fresh()

    def _gone_on(self, snapshot: Snapshot) -> Progress:
        with self._readable(snapshot):
            return self._restored(snapshot)

    def _restored(self, snapshot: Snapshot) -> Progress:
        facts = snapshot.facts
        checkpoints.remove_later(self._folder, snapshot.rounds)
        self._tables.restore(snapshot.rounds, facts["tables"])
        self._board.resumed(snapshot.rounds)
        self._server.ledger.restore(facts["ledger"], snapshot.held)
        scores = facts["validation"]
        return Progress(
            rounds=snapshot.rounds,
            model=GlobalModel(snapshot.state, snapshot.base, facts["trainable"]),
            rank=facts["rank"],
            validation=None if scores is None else Scores(**scores),
            best_at_heating=facts["best_at_heating"],
            timing=Timing(**facts["timing"]),
            clock_s=facts["clock_s"],
            moments=snapshot.moments,
            personal=snapshot.personal,
        )
