"""The runs of a comparison, one after another on the same actors. Source: this project."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from uuid import uuid4

from rayfed_lora.engines.factory import Factory
from rayfed_lora.errors import InterruptedRunError, RayfedError
from rayfed_lora.launching.this_process import local_engine
from rayfed_lora.pages.comparison_tables import Cell, Ended, Standing
from rayfed_lora.pages.run_page import run_page
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.trackers import Tracker
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine

if TYPE_CHECKING:
    from rayfed_lora.engines.on_ray.crew import Crew


class ComparisonServer:
    """Runs cells in order; resumes begun ones, records failures.

    In this process, or as a driver actor, whose cells share one crew of client actors. Other
    threads may call `standing` and `stop`.
    """

    def __init__(self, cells: Sequence[Cell], factory: Factory, ticket: Ticket) -> None:
        """Keep the work; `ticket` is of the process that has claimed the comparison."""
        self._cells = tuple(cells)
        self._factory = factory
        self._ticket = ticket
        self._crew: Crew | None = None
        self._stop = threading.Event()
        self._ended: tuple[Ended, ...] = ()
        self._running: tuple[Cell, StatusBoard] | None = None

    def __repr__(self) -> str:
        return "server of a comparison"

    def run(self, on_change: Callable[[Standing], None] | None = None) -> tuple[Ended, ...]:
        """Run all cells; call `on_change` with the standing on each change, in this thread.

        Raises:
            InterruptedRunError: `stop` was called; finished rounds are saved.
        """
        try:
            for cell in self._cells:
                if self._stop.is_set():
                    raise self._stopped()
                notify = None if on_change is None else lambda _: on_change(self.standing())
                board = StatusBoard(cell.recipe.annealing.total_rounds, notify)
                self._running = cell, board
                ended = self._run_one(cell, board)
                self._ended, self._running = (*self._ended, ended), None
                if on_change is not None:
                    on_change(self.standing())
            return self._ended
        finally:
            if self._crew is not None:
                self._crew.close()

    def _run_one(self, cell: Cell, board: StatusBoard) -> Ended:
        began = time.perf_counter()
        try:
            engine, metrics = self._engine(cell, board)
            summary = simulate(
                cell.recipe,
                engine,
                RunFolder(cell.location),
                board,
                self._stop.is_set,
                resume=True,
                page=run_page,
                name=run_name(cell),
                metrics=metrics,
                ticket=self._ticket,
            )
        except InterruptedRunError:
            raise self._stopped() from None
        except Exception as error:  # the other runs can still be made
            text = str(error) if isinstance(error, RayfedError) else traceback.format_exc()
            return Ended(cell, None, time.perf_counter() - began, text)
        return Ended(cell, summary["final"]["eval_accuracy"], time.perf_counter() - began)

    def _engine(self, cell: Cell, board: StatusBoard) -> tuple[Engine, Tracker | None]:
        """Return what a cell runs on, and the tracker that sets its metrics if any."""
        recipe = cell.recipe
        if recipe.runtime.executor == "local":
            return local_engine(recipe, self._factory), None
        from rayfed_lora.engines.on_ray.crew import Crew
        from rayfed_lora.engines.on_ray.engine import RayEngine
        from rayfed_lora.launching.ray_metrics import run_metrics

        if self._crew is not None and not self._crew.wait(recipe.runtime.start_timeout_s):
            self._crew.close()
            self._crew = None
        if self._crew is None:
            self._crew = Crew.reserved(recipe, f"clients of a comparison {uuid4().hex}")
        engine = RayEngine(recipe, self._factory, board.note, crew=self._crew, step=board.step)
        rounds = recipe.annealing.total_rounds
        return engine, run_metrics(run_name(cell), rounds, engine.usage)

    def _stopped(self) -> InterruptedRunError:
        done = f"{len(self._ended)} of {len(self._cells)} runs done"
        return InterruptedRunError(f"stopped with {done}; rerun the same command to resume")

    def standing(self) -> Standing:
        """Return the progress of the comparison."""
        running, ended = self._running, self._ended
        if running is None:
            return Standing(len(self._cells), ended=ended)
        cell, board = running
        return Standing(len(self._cells), cell, board.status(records_seen=10**9), ended)

    def stop(self) -> None:
        """Abandon the current round and end."""
        self._stop.set()


def run_name(cell: Cell) -> str:
    """Return a run's name: the folders of comparison, method and seed."""
    return "/".join(PurePosixPath(cell.location).parts[-3:])
