"""The driver actor of a run: its round loop and its status. Source: this project."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import ray

from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.engines.on_ray.engine import RayEngine
from rayfed_lora.errors import InterruptedRunError, RayfedError
from rayfed_lora.launching.ray_metrics import run_metrics
from rayfed_lora.pages.run_page import run_page
from rayfed_lora.printable import echo
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.callbacks import Callback
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder

# How long the server of a finished detached run still answers.
_LINGER_S = 600.0


class SimulationServer:
    """Runs one recipe on client actors; if Ray restarts it after its death, it resumes the run.

    Not decorated, so that tests build it without Ray. `run` takes one thread, the other methods
    another: the actor needs max_concurrency 2.
    """

    # Ray asks for an actor's name even if its arguments could not be unpickled: without an answer
    # Ray would restart the actor for ever.
    _name = "server"

    def __init__(
        self,
        recipe: Recipe,
        location: str,
        *,
        resume: bool = False,
        factory: Factory | None = None,
        ticket: Ticket | None = None,
        detached: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Keep the arguments.

        Args:
            recipe: the run, with absolute paths.
            location: its claimed folder, an absolute path or a URI.
            resume: continue from the newest checkpoint.
            factory: builds workload and trainers in the workers.
            ticket: the right to take over the folder from the process that claimed it; a restarted
                actor uses it again.
            callbacks: called with each finished round, here.
            detached: start the run at once, in a thread: a call of `run` would be lost with the
                process that made it, and not be repeated after a restart.
        """
        self._name = f"server of {recipe.name}"
        self._recipe, self._location, self._ticket = recipe, location, ticket
        self._factory = factory or TorchFactory()
        self._callbacks = callbacks
        self._stop = threading.Event()
        self._board = StatusBoard(recipe.annealing.total_rounds)
        # Read here: threads of a detached run have no Ray context.
        context = ray.get_runtime_context()
        self._run_id = context.get_actor_id()
        self._restarted: bool = context.was_current_actor_reconstructed
        self._resume = resume or self._restarted
        if detached:
            actor = context.current_actor
            threading.Thread(target=self._run_detached, args=(actor,), daemon=True).start()

    def __repr__(self) -> str:
        return self._name

    def run(self) -> dict[str, Any]:
        """Run to the end and return the summary; raises what `simulate` raises."""
        recipe, folder, board = self._recipe, RunFolder(self._location), self._board
        engine = RayEngine(
            recipe, self._factory, board.note, self._run_id, again=self._restarted, step=board.step
        )
        return simulate(
            recipe,
            engine,
            folder,
            board,
            self._stop.is_set,
            resume=self._resume,
            page=run_page,
            metrics=run_metrics(folder.name, recipe.annealing.total_rounds, engine.usage),
            ticket=self._ticket,
            callbacks=self._callbacks,
        )

    def _run_detached(self, actor: Any) -> None:
        """Run, report a failure in the status, and end the actor after a while."""
        try:
            self.run()
        except InterruptedRunError as error:
            self._board.note(str(error))
            self._board.phase("stopped")
        except Exception as error:  # no caller receives it: the status reports it
            text = str(error) if isinstance(error, RayfedError) else traceback.format_exc()
            echo(text, file=sys.stderr)  # for Ray's logs
            self._board.note(text)
            self._board.phase("failed")
        time.sleep(_LINGER_S)
        ray.kill(actor)

    def status(self, records_seen: int = 0, notes_seen: int = 0) -> Status:
        """Return the status of the run, at any time; arguments as for `StatusBoard.status`."""
        return self._board.status(records_seen, notes_seen)

    def stop(self) -> None:
        """Abandon the current round, save the run and end it."""
        self._stop.set()
