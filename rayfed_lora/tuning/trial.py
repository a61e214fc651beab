"""One Tune trial is one run; a step is a round. Source: this project, on ray.tune's class API."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune

from rayfed_lora.engines.factory import Factory
from rayfed_lora.engines.on_ray.crew import Crew
from rayfed_lora.engines.on_ray.engine import RayEngine
from rayfed_lora.engines.on_ray.placement import Layout
from rayfed_lora.errors import RunFolderError
from rayfed_lora.launching.ray_metrics import run_metrics
from rayfed_lora.locations import child
from rayfed_lora.pages.search_page import SEARCH_FILE
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checked import table
from rayfed_lora.runs.leases.lease_files import is_lease_file
from rayfed_lora.runs.ownership import Ticket, owned
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.tables import ROUNDS_FILE, Tables
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.distributions import DRAW
from rayfed_lora.tuning.search_folders import apply_draw, copy_run, current_recipe, measured
from rayfed_lora.tuning.space import Space


@dataclass(frozen=True)
class Search:
    """The facts that all trials of a search share; `recipe` has the values that are not drawn.

    `location` is the search's folder, `ticket` that of the process that owns the folder.
    """

    space: Space
    recipe: Recipe
    location: str
    ticket: Ticket
    factory: Factory


class Trial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Runs the recipe of its draw; the run folder is the checkpoint.

    A restarted trial resumes from its run folder. Its client actors, in the trial's placement
    group, are kept for the next trial where Tune reuses this one.
    """

    def setup(
        self, config: dict[str, Any], search: Any = None, layout: Any = None, shelf: Any = None
    ) -> None:
        """Set the draw; nothing starts before the first step.

        `layout` places a trial's client actors; `shelf` is the actor of the `Shelf` with data and
        base models.
        """
        self._search: Search = search
        self._layout: Layout = layout
        self._shelf = shelf
        self._crew: Crew | None = None
        self._set_draw(config)

    def _set_draw(self, config: Mapping[str, Any]) -> None:
        self._draw: Mapping[str, Any] = config[DRAW]
        self._rounds: Generator[Tables, None, dict[str, Any]] | None = None
        self._board = StatusBoard(0)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Set another draw and keep the client actors."""
        self._end()
        self._set_draw(new_config)
        return True

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(child(self._search.location, "trials", self.trial_id))

    @property
    def _ticket(self) -> Ticket:
        """A ticket for each trial: after a restart the newest process owns the folder."""
        ticket = self._search.ticket
        return replace(ticket, run=f"{ticket.run} {self.trial_id}")

    def step(self) -> dict[str, Any]:
        """Run a round, or up to the first tested round where objectives need tests."""
        if self._rounds is None:
            self._rounds = self._start()
        tests = any(name.startswith("eval_") for name in self._search.space.objectives)
        for tables in self._rounds:
            report = measured(tables.rounds)
            known = report["eval_loss"] is not None or not tests
            if known and report["round"] < self._total:
                return self._reported(report)
        return {**self._reported(measured(table(self._folder, ROUNDS_FILE))), "done": True}

    def _reported(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return a report in which every objective is a number, for the schedulers."""
        unknown = {name for name in self._search.space.objectives if report[name] is None}
        notes = len(self._board.status().notes)
        return {**report, **dict.fromkeys(unknown, math.nan), "warnings": notes}

    def _start(self) -> Generator[Tables, None, dict[str, Any]]:
        folder, search = self._folder, self._search
        if not RunFolder(search.location).exists(SEARCH_FILE):
            raise RunFolderError(
                f"{search.location}: expected --out on storage that all nodes share; the node of a"
                " trial cannot read it"
            )
        recipe = current_recipe(folder, search.space, search.recipe, self._draw)
        if self._crew is not None and not self._crew.wait(recipe.runtime.start_timeout_s):
            self._crew = None
        if self._crew is None:
            group = ray.util.get_current_placement_group()
            places = [(group, i) for i in range(self._layout.actors)]
            self._crew = Crew(recipe, self._layout, places, self._shelf)
        self._total = recipe.annealing.total_rounds
        self._board = StatusBoard(self._total)
        engine = RayEngine(recipe, search.factory, self._board.note, crew=self._crew)
        name = f"{RunFolder(search.location).name}/{self.trial_id}"
        return simulate_rounds(
            recipe,
            engine,
            folder,
            self._board,
            lambda: False,
            resume=True,
            name=name,
            metrics=run_metrics(name, self._total, engine.usage),
            ticket=self._ticket,
        )

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the run so far, for another trial to continue."""
        copy_run(self._folder, RunFolder(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continue a copied run, with this trial's draw in the remaining rounds."""
        self._end()
        source = RunFolder(checkpoint_dir)
        with owned(self._folder, self._ticket, wait=True) as (folder, _):
            for name in folder.names():
                if not is_lease_file(name):
                    folder.remove(name)
            copy_run(source, folder)
            apply_draw(folder, self._search.space, self._search.recipe, self._draw)

    def _end(self) -> None:
        if self._rounds is not None:
            self._rounds.close()
            self._rounds = None

    def cleanup(self) -> None:
        """Save the finished rounds and release the client actors."""
        self._end()
        self._crew = None
