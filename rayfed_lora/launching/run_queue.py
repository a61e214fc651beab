"""The runs of a comparison, one after another on the same actors. Source: this project."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from rayfed_lora.errors import InterruptedRunError, RayfedError
from rayfed_lora.pages.comparison import Cell, Ended, Standing
from rayfed_lora.pages.run_page import run_page
from rayfed_lora.runs.claiming import complete
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.trackers import Tracker
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine

# Builds what a cell runs on; the board receives notes for the user.
MakeExecutor = Callable[[Cell, StatusBoard], tuple[Engine, Tracker | None]]


class RunQueue:
    """Runs cells in order; skips finished ones, resumes begun ones, records failures.

    Free of Ray; other threads may call `standing` and `stop`.
    """

    def __init__(self, cells: Sequence[Cell], make: MakeExecutor, ticket: Ticket) -> None:
        """Keep the work.

        Args:
            cells: the runs.
            make: builds a cell's engine, and a tracker of its rounds if there is one.
            ticket: of the process that has claimed the comparison.
        """
        self._cells = tuple(cells)
        self._make = make
        self._ticket = ticket
        self._stop = threading.Event()
        self._ended: tuple[Ended, ...] = ()
        self._running: tuple[Cell, StatusBoard] | None = None

    def run(self, on_change: Callable[[Standing], None] | None = None) -> tuple[Ended, ...]:
        """Run all cells.

        Args:
            on_change: called on each change with the standing, in the thread that runs.

        Raises:
            InterruptedRunError: `stop` was called; finished rounds are saved.
        """
        for cell in self._cells:
            if self._stop.is_set():
                raise InterruptedRunError(self._stopped())
            notify = None if on_change is None else lambda _: on_change(self.standing())
            board = StatusBoard(cell.recipe.annealing.total_rounds, notify)
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
            engine, metrics = self._make(cell, board)
            summary = simulate(
                cell.recipe,
                engine,
                folder,
                board,
                self._stop.is_set,
                resume=True,
                page=run_page,
                name=run_name(cell),
                metrics=metrics,
                ticket=self._ticket,
            )
        except InterruptedRunError:
            raise InterruptedRunError(self._stopped()) from None
        except Exception as error:  # the other runs can still be made
            text = str(error) if isinstance(error, RayfedError) else traceback.format_exc()
            return Ended(cell, None, time.perf_counter() - began, text)
        return Ended(cell, summary["final"]["eval_accuracy"], time.perf_counter() - began)

    def _stopped(self) -> str:
        return (
            f"stopped with {len(self._ended)} of {len(self._cells)} runs done; rerun the same"
            " command to resume"
        )

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
