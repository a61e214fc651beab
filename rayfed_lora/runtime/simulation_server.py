"""The driver actor: owns a run's round loop, answers while it runs, survives its submitter.

Source: this project.
"""

from __future__ import annotations

import threading
from typing import Any

import ray

from rayfed_lora.recipe import Recipe
from rayfed_lora.reporting.status import Status, StatusBoard
from rayfed_lora.runtime.factory import Factory
from rayfed_lora.runtime.ray_executor import RayExecutor
from rayfed_lora.runtime.session import simulate
from rayfed_lora.storage import RunFolder


class SimulationServer:
    """Runs one recipe on client actors; after its own death Ray starts it again, and it goes on.

    Not decorated, so that tests build it without Ray. `run` takes one thread, the other methods
    another: the actor needs max_concurrency 2.
    """

    def __init__(self, recipe: Recipe, location: str, resume: bool, factory: Factory) -> None:
        """Keep the run.

        Args:
            recipe: the run.
            location: claimed run folder.
            resume: go on from a checkpoint.
            factory: makes workload and trainers inside the workers.
        """
        self._recipe = recipe
        self._location = location
        self._resume = resume
        self._factory = factory
        self._stop = threading.Event()
        self._board = StatusBoard(recipe.annealing.total_rounds)

    def __repr__(self) -> str:
        return f"server of {self._recipe.name}"

    def run(self) -> dict[str, Any]:
        """Run to the end and return the summary; raises what `simulate` raises."""
        context = ray.get_runtime_context()
        again = context.was_current_actor_reconstructed
        run_id = context.get_actor_id()
        executor = RayExecutor(self._recipe, self._factory, self._board.note, run_id)
        return simulate(
            self._recipe,
            executor,
            RunFolder(self._location),
            self._board,
            self._stop.is_set,
            resume=self._resume or again,
        )

    def status(self, records_seen: int = 0, notes_seen: int = 0) -> Status:
        """Return where the run stands, at any time."""
        return self._board.status(records_seen, notes_seen)

    def stop(self) -> None:
        """Abandon the running round, save the run and end it."""
        self._stop.set()
