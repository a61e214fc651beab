"""Several runs one after another on the same actors: a method and a seed each.

Source: this project.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rayfed_lora.engines.factory import Factory, TorchFactory, in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import BadInputError, InterruptedRunError, RayfedError, RunFolderError
from rayfed_lora.launching import launch
from rayfed_lora.locations import child
from rayfed_lora.pages.comparison import Cell, Comparison, Ended, Standing
from rayfed_lora.pages.report import run_page
from rayfed_lora.pages.search import SEARCH_FILE
from rayfed_lora.recipe.layers import override_pairs
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.notes import given_way_in_comparison
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.claiming import claim, complete, say
from rayfed_lora.runs.location import run_location, with_absolute_paths
from rayfed_lora.runs.ownership import Ticket, owned
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.tracking import Tracker
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine

if TYPE_CHECKING:
    from rayfed_lora.engines.on_ray.crew import Crew
    from rayfed_lora.engines.on_ray.engine import RayEngine

# Makes the executor of a run; the board is told what the user should know.
MakeExecutor = Callable[[Recipe, StatusBoard], Engine]
Methods = Sequence[str] | Mapping[str, Mapping[str, Any]]
_POLL_S = 0.25
# A method's name is a folder's too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Queue:
    """Runs cells in order; finished ones are passed over, begun ones go on, failed ones are noted.

    Knows no Ray; safe to read from another thread.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        make: MakeExecutor,
        metrics: Callable[[Cell, Any], Tracker | None] = lambda cell, executor: None,
        ticket: Ticket | None = None,
    ) -> None:
        """Keep the work.

        Args:
            cells: what to run.
            make: makes each run's executor.
            metrics: makes what follows a run on that executor.
            ticket: of the process that has claimed the comparison.
        """
        self._cells = tuple(cells)
        self._make = make
        self._metrics = metrics
        self._ticket = ticket
        self._stop = threading.Event()
        self._ended: tuple[Ended, ...] = ()
        self._running: tuple[Cell, StatusBoard] | None = None

    def run(self, on_change: Callable[[Standing], None] | None = None) -> tuple[Ended, ...]:
        """Run all cells.

        Args:
            on_change: called with the standing now and then, from the thread that runs.

        Raises:
            InterruptedRunError: `stop` was called; finished rounds are saved.
        """
        for cell in self._cells:
            if self._stop.is_set():
                raise InterruptedRunError(self._stopped())
            tell = None if on_change is None else lambda _: on_change(self.standing())
            board = StatusBoard(cell.recipe.annealing.total_rounds, tell)
            self._running = cell, board
            ended = self._run_one(cell, board)
            self._ended, self._running = (*self._ended, ended), None
            if on_change is not None:
                on_change(self.standing())
        return self._ended

    def _run_one(self, cell: Cell, board: StatusBoard) -> Ended:
        began, folder = time.perf_counter(), RunFolder(cell.location)
        try:
            summary = complete(folder)
            if summary is not None:
                return Ended(cell, summary["final"]["eval_accuracy"], 0.0)
            executor = self._make(cell.recipe, board)
            summary = simulate(
                cell.recipe,
                executor,
                folder,
                board,
                self._stop.is_set,
                resume=True,
                page=run_page,
                name=_name(cell),
                metrics=self._metrics(cell, executor),
                ticket=self._ticket,
            )
        except InterruptedRunError:
            raise InterruptedRunError(self._stopped()) from None
        except Exception as error:  # whatever it is, the other runs can still be made
            why = str(error) if isinstance(error, RayfedError) else traceback.format_exc()
            return Ended(cell, None, time.perf_counter() - began, why)
        return Ended(cell, summary["final"]["eval_accuracy"], time.perf_counter() - began)

    def _stopped(self) -> str:
        return (
            f"stopped with {len(self._ended)} of {len(self._cells)} runs done; the same command"
            " goes on"
        )

    def standing(self) -> Standing:
        """Return where the comparison stands."""
        running, ended = self._running, self._ended
        if running is None:
            return Standing(len(self._cells), ended=ended)
        cell, board = running
        return Standing(len(self._cells), cell, board.status(records_seen=10**9), ended)

    def stop(self) -> None:
        """Abandon the running round and end."""
        self._stop.set()


class ComparisonServer:
    """A driver actor that runs a comparison on one crew of client actors."""

    def __init__(
        self, cells: Sequence[Cell], factory: Factory, ticket: Ticket | None = None
    ) -> None:
        """Keep the cells.

        Args:
            cells: what to run.
            factory: makes workloads and trainers inside the workers.
            ticket: of the process that has claimed the comparison.
        """
        self._factory = factory
        self._crew: Crew | None = None
        self._queue = Queue(cells, self._executor, _metrics, ticket)

    def __repr__(self) -> str:
        return "server of a comparison"

    def _executor(self, recipe: Recipe, board: StatusBoard) -> Engine:
        from rayfed_lora.engines.on_ray.crew import Crew
        from rayfed_lora.engines.on_ray.engine import RayEngine

        if self._crew is not None and not self._crew.wait(recipe.runtime.start_timeout_s):
            self._crew.close()
            self._crew = None
        if self._crew is None:
            self._crew = Crew.reserved(recipe, f"clients of a comparison {uuid4().hex}")
        return RayEngine(recipe, self._factory, board.note, crew=self._crew)

    def run(self) -> tuple[Ended, ...]:
        """Run all cells; raises InterruptedRunError after `stop`."""
        try:
            return self._queue.run()
        finally:
            if self._crew is not None:
                self._crew.close()

    def standing(self) -> Standing:
        """Return where the comparison stands, at any time."""
        return self._queue.standing()

    def stop(self) -> None:
        """Abandon the running round and end."""
        self._queue.stop()


def _name(cell: Cell) -> str:
    """Return a run's name: the folders of comparison, method and seed."""
    return "/".join(PurePosixPath(cell.location).parts[-3:])


def _metrics(cell: Cell, executor: RayEngine) -> Tracker | None:
    from rayfed_lora.launching.metrics import run_metrics

    return run_metrics(_name(cell), cell.recipe.annealing.total_rounds, executor.usage)


def cells_of(
    recipe: Recipe | str | Path | Mapping[str, Any],
    methods: Methods,
    seeds: Sequence[int],
    out: str,
    settings: Sequence[str] | Mapping[str, Any] = (),
) -> list[Cell]:
    """Return the cells of a comparison: the recipe under each method and seed.

    Seed by seed, so that methods of the same seed share their data: all hold out as much for
    validation as one of them needs, where `data.validation_fraction` is auto.

    Raises:
        BadInputError: no method or seed, one twice, or a recipe that is refused.
    """
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise BadInputError(f"--{name}: expected at least one, none twice, got {list(values)}")
    if not isinstance(methods, Mapping):
        methods = {name: {"method": name} for name in methods}
    wrong = [name for name in methods if not _NAME.fullmatch(name)]
    if wrong:
        raise BadInputError(
            f"methods: expected names of letters, digits, '.', '_' and '-', got {wrong[0]!r}"
        )
    if not isinstance(settings, Mapping):
        settings = dict(override_pairs("--set", settings))
    if "method" in settings and all("method" in own for own in methods.values()):
        raise BadInputError("--set method: expected none, --methods names those of a comparison")
    # Under a method each: the bare recipe's own may not go with what the others are to have.
    bases = {name: load_recipe(recipe, settings, own) for name, own in methods.items()}
    told = tuple(given_way_in_comparison(next(iter(bases.values())), seeds))
    held_out = {name: _held_out(base) for name, base in bases.items()}
    most = max(fraction or 0.0 for fraction in held_out.values())
    cells: list[Cell] = []
    for seed in seeds:
        for name, own in methods.items():
            variant = {**own, "seed": seed}
            if held_out[name] is not None and most > 0:
                variant["data.validation_fraction"] = most
            given = load_recipe(recipe, settings, variant)
            if cells and given.runtime != cells[0].recipe.runtime:
                raise BadInputError(
                    f"methods: expected the same runtime for all, since they share actors; {name!r}"
                    f" has another than {cells[0].method!r}"
                )
            # Keys without effect under one method are meant for another.
            given = given.with_provenance(frozenset(), (*given.overruled, *(() if cells else told)))
            location = child(out, name, f"seed-{seed}")
            cells.append(Cell(name, seed, with_absolute_paths(given), location))
    return cells


def _held_out(recipe: Recipe) -> float | None:
    """Return the share of the data that a method holds out by itself; None where it is told."""
    return recipe.validation_fraction if recipe.data.validation_fraction == "auto" else None


def compare(  # noqa: PLR0913 - a user names them
    recipe: Recipe | str | Path | Mapping[str, Any],
    methods: Methods,
    out: str,
    seeds: Sequence[int] = (0,),
    *,
    settings: Sequence[str] | Mapping[str, Any] = (),
    target: float | None = None,
    address: str | None = None,
    watch: Callable[[Standing], None] | None = None,
    factory: Factory | None = None,
) -> Comparison:
    """Run a recipe under several methods and seeds; write tables and plots of all into `out`.

    Each run has a folder of its own, `out/<method>/seed-<seed>`. Called again, it goes on: finished
    runs are not run again.

    Args:
        recipe: as for `run`.
        methods: names of presets, each put over the recipe's own keys; or overrides by a name of
            your own, e.g. {"low": {"method": "fedlora", "annealing.heating.rank": 2}}.
        out: folder or URI of the comparison.
        seeds: of the runs.
        settings: further overrides of the recipe, as for `--set`; the keys that set another method
            apart stay as its preset has them.
        target: accuracy to reach, for rounds and bytes to it; None: 95 % of the best one.
        address: of a running Ray cluster; default $RAY_ADDRESS, or a Ray of our own.
        watch: called with the standing from time to time.
        factory: what workers make of a recipe; for tests.

    Raises:
        BadInputError: refused before anything started.
        InterruptedRunError: stopped by SIGINT; call again to go on.
    """
    out = run_location(out, "")
    folder = RunFolder(out)
    # Absolutely: workers may run in another folder.
    where = out if folder.local is None else str(folder.local)
    cells = cells_of(recipe, methods, seeds, where, settings)
    for name, kind in (("recipe.yaml", "a run"), (SEARCH_FILE, "a search")):
        if folder.exists(name):
            raise RunFolderError(
                f"{folder.location}: expected a folder for a comparison, it holds {kind}"
            )
    for cell in cells:
        claim(RunFolder(cell.location), cell.recipe, resume=True)
    factory, watch = factory or TorchFactory(), watch or (lambda standing: None)
    # One command at a time: another one would write the same tables.
    with owned(folder, Ticket.of_this_process(), wait=True, tell=say) as (folder, lease):
        todo, failed = _begun(cells)
        if todo:
            run = _run_here if todo[0].recipe.runtime.executor == "local" else _run_on_ray
            ended = run(todo, factory, watch, address, lease.ticket)
            failed |= {each.cell.location: each.error for each in ended if each.error is not None}
        comparison = Comparison.of(cells, failed, target)
        comparison.write(folder)
        return comparison


def _begun(cells: Sequence[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells that are to be run, and what ails those that cannot be, by location."""
    todo: list[Cell] = []
    failed: dict[str, str] = {}
    for cell in cells:
        try:
            if complete(RunFolder(cell.location)) is None:
                todo.append(cell)
        except RunFolderError as error:
            say(
                f"{_name(cell)} is left out: {error} (here: delete {cell.location} and compare"
                " again)"
            )
            failed[cell.location] = str(error)
    return todo, failed


def _run_here(
    cells: Sequence[Cell],
    factory: Factory,
    watch: Callable[[Standing], None],
    address: str | None,
    ticket: Ticket,
) -> tuple[Ended, ...]:
    launch.refuse_address(cells[0].recipe, address)

    def executor(recipe: Recipe, board: StatusBoard) -> Engine:
        device = launch.local_device(recipe)
        return LocalEngine(lambda: in_process(recipe, factory, device))

    queue = Queue(cells, executor, ticket=ticket)
    with launch.interruptible(queue.stop):
        return queue.run(watch)


def _run_on_ray(
    cells: Sequence[Cell],
    factory: Factory,
    watch: Callable[[Standing], None],
    address: str | None,
    ticket: Ticket,
) -> tuple[Ended, ...]:
    with launch.ray_session(address):
        # Not before: Ray reads its settings when it is imported.
        import ray

        options = {
            "num_cpus": 0,
            "max_concurrency": 2,
            "scheduling_strategy": launch.on_this_node(),
        }
        server = ray.remote(ComparisonServer).options(**options).remote(cells, factory, ticket)
        result = server.run.remote()
        stop, told = threading.Event(), False
        with launch.ended_with_us(server, result), launch.interruptible(stop.set):
            while True:
                ready, _ = ray.wait([result], timeout=_POLL_S)
                if stop.is_set() and not told:
                    server.stop.remote()
                    told = True
                with launch.unwrapped_errors():
                    watch(ray.get(server.standing.remote()))
                    if ready:
                        ended: tuple[Ended, ...] = ray.get(result)
                        return ended
