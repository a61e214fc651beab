"""The driver actor: runs the round loop, answers while it runs, survives the submitting process.

Source: this project.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from typing import Any

import ray

from rayfed_lora.engines.on_ray.engine import RayEngine
from rayfed_lora.errors import InterruptedRunError, RayfedError
from rayfed_lora.launching.metrics import run_metrics
from rayfed_lora.launching.request import RunRequest
from rayfed_lora.pages.run_page import run_page
from rayfed_lora.printable import echo
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

    def __init__(self, request: RunRequest, detached: bool = False) -> None:
        """Keep the request.

        Args:
            request: the run; its location is absolute.
            detached: start the run at once, in a thread: a call of `run` would be lost with the
                process that made it, and not be repeated after a restart.
        """
        self._name = f"server of {request.recipe.name}"
        self._request = request
        self._stop = threading.Event()
        self._board = StatusBoard(request.recipe.annealing.total_rounds)
        # Read here: threads of a detached run have no Ray context.
        context = ray.get_runtime_context()
        self._run_id = context.get_actor_id()
        self._restarted: bool = context.was_current_actor_reconstructed
        if detached:
            actor = context.current_actor
            threading.Thread(target=self._run_detached, args=(actor,), daemon=True).start()

    def __repr__(self) -> str:
        return self._name

    def run(self) -> dict[str, Any]:
        """Run to the end and return the summary; raises what `simulate` raises."""
        recipe, folder = self._request.recipe, RunFolder(self._request.location)
        engine = RayEngine(
            recipe, self._request.factory, self._board.note, self._run_id, again=self._restarted
        )
        return simulate(
            recipe,
            engine,
            folder,
            self._board,
            self._stop.is_set,
            resume=self._request.resume or self._restarted,
            page=run_page,
            metrics=run_metrics(folder.name, recipe.annealing.total_rounds, engine.usage),
            ticket=self._request.ticket,
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
            # To Ray's logs, too.
            echo(text, file=sys.stderr)
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
