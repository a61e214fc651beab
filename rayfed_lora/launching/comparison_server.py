"""The driver actor of a comparison. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from rayfed_lora.engines.factory import Factory
from rayfed_lora.engines.on_ray.crew import Crew
from rayfed_lora.engines.on_ray.engine import RayEngine
from rayfed_lora.launching.metrics import run_metrics
from rayfed_lora.launching.run_queue import RunQueue, run_name
from rayfed_lora.pages.comparison import Cell, Ended, Standing
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.trackers import Tracker
from rayfed_lora.tasks.engine import Engine


class ComparisonServer:
    """A driver actor that runs the cells of a comparison on one crew of client actors."""

    def __init__(self, cells: Sequence[Cell], factory: Factory, ticket: Ticket) -> None:
        """Keep the cells; the factory builds workloads and trainers in the workers."""
        self._factory = factory
        self._crew: Crew | None = None
        self._queue = RunQueue(cells, self._engine, ticket)

    def __repr__(self) -> str:
        return "server of a comparison"

    def _engine(self, cell: Cell, board: StatusBoard) -> tuple[Engine, Tracker | None]:
        recipe = cell.recipe
        if self._crew is not None and not self._crew.wait(recipe.runtime.start_timeout_s):
            self._crew.close()
            self._crew = None
        if self._crew is None:
            self._crew = Crew.reserved(recipe, f"clients of a comparison {uuid4().hex}")
        engine = RayEngine(recipe, self._factory, board.note, crew=self._crew)
        rounds = recipe.annealing.total_rounds
        return engine, run_metrics(run_name(cell), rounds, engine.usage)

    def run(self) -> tuple[Ended, ...]:
        """Run all cells; raises InterruptedRunError after `stop`."""
        try:
            return self._queue.run()
        finally:
            if self._crew is not None:
                self._crew.close()

    def standing(self) -> Standing:
        """Return the progress of the comparison, at any time."""
        return self._queue.standing()

    def stop(self) -> None:
        """Abandon the current round and end."""
        self._queue.stop()
