"""The driver actor: owns a run's round loop, answers while it runs, survives its submitter.

Source: this project.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from typing import Any

import ray

from rayfed_lora.engines.factory import Factory
from rayfed_lora.engines.on_ray.engine import RayEngine
from rayfed_lora.errors import InterruptedRunError, RayfedError
from rayfed_lora.launching.metrics import run_metrics
from rayfed_lora.pages.report import run_page
from rayfed_lora.printable import echo
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder

# How long the server of a detached run that is over still answers.
_LINGER_S = 600.0


class SimulationServer:
    """Runs one recipe on client actors; after its own death Ray starts it again, and it goes on.

    Not decorated, so that tests build it without Ray. `run` takes one thread, the other methods
    another: the actor needs max_concurrency 2.
    """

    # Ray asks who an actor is even where what it is made with could not be read: without an answer
    # it would start it again for ever.
    _name = "server"

    def __init__(
        self,
        recipe: Recipe,
        location: str,
        resume: bool,
        factory: Factory,
        detached: bool = False,
        ticket: Ticket | None = None,
    ) -> None:
        """Keep the run.

        Args:
            recipe: the run.
            location: claimed run folder.
            resume: go on from a checkpoint.
            factory: makes workload and trainers inside the workers.
            detached: start the run at once, in a thread of its own: a call of `run` would be
                lost with the process that made it, and not be made again after a restart.
            ticket: of the process that has claimed the folder; a restarted actor takes the folder
                over by it, too.
        """
        self._name = f"server of {recipe.name}"
        self._recipe = recipe
        self._location = location
        self._resume = resume
        self._factory = factory
        self._ticket = ticket
        self._stop = threading.Event()
        self._board = StatusBoard(recipe.annealing.total_rounds)
        if detached:
            self._itself = ray.get_runtime_context().current_actor
            threading.Thread(target=self._run_detached, args=_identity(), daemon=True).start()

    def __repr__(self) -> str:
        return self._name

    def run(self) -> dict[str, Any]:
        """Run to the end and return the summary; raises what `simulate` raises."""
        return self._run(*_identity())

    def _run_detached(self, run_id: str, again: bool) -> None:
        """Run with nobody to raise to: a failure is what `status` tells."""
        try:
            self._run(run_id, again)
        except InterruptedRunError as error:
            self._board.note(str(error))
            self._board.phase("stopped")
        except Exception as error:  # whatever it is, `status` is the only one to tell it
            told = str(error) if isinstance(error, RayfedError) else traceback.format_exc()
            # To Ray's logs, too.
            echo(told, file=sys.stderr)
            self._board.note(told)
            self._board.phase("failed")
        time.sleep(_LINGER_S)
        ray.kill(self._itself)

    def _run(self, run_id: str, again: bool) -> dict[str, Any]:
        executor = RayEngine(self._recipe, self._factory, self._board.note, run_id, again=again)
        folder = RunFolder(self._location)
        rounds = self._recipe.annealing.total_rounds
        return simulate(
            self._recipe,
            executor,
            folder,
            self._board,
            self._stop.is_set,
            resume=self._resume or again,
            page=run_page,
            metrics=run_metrics(folder.name, rounds, executor.usage),
            ticket=self._ticket,
        )

    def status(self, records_seen: int = 0, notes_seen: int = 0) -> Status:
        """Return where the run stands, at any time."""
        return self._board.status(records_seen, notes_seen)

    def stop(self) -> None:
        """Abandon the running round, save the run and end it."""
        self._stop.set()


def _identity() -> tuple[str, bool]:
    """Return this actor's id, and whether Ray has started it again; the id stays the same."""
    context = ray.get_runtime_context()
    return context.get_actor_id(), context.was_current_actor_reconstructed
