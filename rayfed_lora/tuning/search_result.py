"""Table of trials, Pareto front and best recipes of a search. Source: this project."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rayfed_lora.errors import BadInputError, RunError, RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.pages.plots import write_front
from rayfed_lora.pages.search_page import read_search, search_html
from rayfed_lora.pages.table_files import write_table
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import seals
from rayfed_lora.runs.checked import CheckedFolder
from rayfed_lora.runs.checksums import REPORT_FILE, read_summary
from rayfed_lora.runs.claiming import say
from rayfed_lora.runs.reading import read_errors
from rayfed_lora.runs.saving import optional_page
from rayfed_lora.runs.tables import ROUNDS_FILE
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning import pareto
from rayfed_lora.tuning.draws import recipe_values
from rayfed_lora.tuning.search_folders import changes, measured
from rayfed_lora.tuning.space import METRICS, Space


@dataclass(frozen=True)
class TrialOutcome:
    """The end of a trial as Tune reports it: its id, draw, last report and reason of a failure.

    The draw is empty where the trial failed before it; so are the metrics without a report.
    """

    trial: str
    draw: Mapping[str, Any]
    metrics: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """The tables of a search.

    Attributes:
        location: the search's folder.
        trials: rows of trials.parquet: trial, status, error, location, drawn values by recipe key,
            last metrics, `on_front`.
        best: trial id by objective; with several objectives also by `knee`.
    """

    location: str
    trials: pd.DataFrame
    best: Mapping[str, str]

    @property
    def front(self) -> pd.DataFrame:
        """The Pareto front of the finished trials."""
        return self.trials[self.trials["on_front"]]

    @classmethod
    def of(
        cls, location: str, space: Space, recipe: Recipe, outcomes: Sequence[TrialOutcome]
    ) -> SearchResult:
        """Read the trials' run folders.

        Only finished trials are compared: metrics of shorter runs are not comparable.

        Raises:
            RunError: no trial has finished.
        """
        rows = [_row(child(location, "trials", t.trial), space, recipe, t) for t in outcomes]
        trials = pd.DataFrame(rows)
        for key in space.drawn:
            # A Parquet column has one type.
            if pd.api.types.infer_dtype(trials[key], skipna=True) in ("mixed", "mixed-integer"):
                trials[key] = trials[key].map(lambda value: None if value is None else str(value))
        names, modes = list(space.objectives), list(space.objectives.values())
        values = trials[names].to_numpy(np.float64)
        # The loss of a diverged model is not finite.
        valid = (trials["status"] == "finished").to_numpy() & np.isfinite(values).all(axis=1)
        done, values = np.flatnonzero(valid), values[valid]
        if len(done) == 0:
            reasons = "\n".join(trials["error"].dropna().unique())
            raise RunError(f"no trial of the search finished with {', '.join(names)}\n{reasons}")
        trials["on_front"] = False
        trials.loc[done[pareto.on_front(values, modes)], "on_front"] = True
        places = {name: pareto.best(values, modes, i) for i, name in enumerate(names)}
        if len(names) > 1:
            places["knee"] = pareto.knee(values, modes)
        best = {name: str(trials.loc[done[place], "trial"]) for name, place in places.items()}
        return cls(location, trials, best)

    def write(self, space: Space, folder: RunFolder | None = None) -> None:
        """Write trials as Parquet and CSV, best recipes, the plot of the front, and the report.

        `folder` is the search's folder, guarded by the lease; None: `location`, unguarded.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = folder or RunFolder(self.location)
        write_table(folder, "trials", self.trials)
        for i, (name, trial) in enumerate(self.best.items()):
            content = self._recipe_of(name, trial).encode()
            folder.write(f"best-{name}.yaml", content)
            if i == 0:
                folder.write("best.yaml", content)
        names = list(space.objectives)
        if len(names) > 1:
            write_front(folder, self.trials, names[0], names[1])
        with optional_page(folder, say):
            folder.write(REPORT_FILE, search_html(read_search(folder)).encode())

    def _recipe_of(self, name: str, trial: str) -> str:
        folder = RunFolder(child(self.location, "trials", trial))
        row = self.trials.set_index("trial").loc[trial]
        heading = [f"# The best trial of a search by {name}: {trial}"]
        heading += [f"# {key}: {row[key]:.6g}" for key in self.best if key in self.trials]
        rounds = ", ".join(str(change["after_round"]) for change in changes(folder))
        if rounds:
            heading.append(
                f"# These are the values of its last rounds; they were others up to round {rounds}"
                f" (trials/{trial}/changes.json), so a run of this recipe has another result."
            )
        return "\n".join([*heading, seals.text(folder, "recipe.yaml")])


def _row(location: str, space: Space, recipe: Recipe, outcome: TrialOutcome) -> dict[str, Any]:
    """Return a row of trials.parquet; a trial with a damaged folder at `location` has failed."""
    error = outcome.error
    try:
        with read_errors(RunFolder(location)):
            facts, final = _results(RunFolder(location))
    except RunFolderError as damage:
        facts, final, error = {}, {}, str(damage)
    status = "unfinished"
    if facts:
        status = "finished"
    elif error is not None:
        status = "failed"
    elif outcome.metrics.get("done"):
        status = "ended early"
    row: dict[str, Any] = {"trial": outcome.trial, "status": status}
    row |= {"error": error if status == "failed" else None, "location": location}
    row |= drawn_values(space, recipe, outcome.draw)
    # After a stop, the last report to Tune may be older than the run folder.
    metrics = {**outcome.metrics, **final}
    row |= {name: metrics.get(name) for name in ("round", *METRICS, "warnings")}
    return row | facts


def _results(folder: RunFolder) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return a trial's totals and last metrics; both empty where it has not finished."""
    summary = read_summary(folder)
    if summary is None:
        return {}, {}
    files = CheckedFolder(folder)
    # Checked since the best trial's recipe is part of the result.
    files.read("recipe.yaml")
    facts = {
        "best_accuracy": summary["best"]["eval_accuracy"],
        "reduction_vs_fedavg": summary["communication"]["reduction_vs_fedavg"],
        "wall_s": summary["timing"]["wall_s"],
    }
    return facts, measured(files.table(ROUNDS_FILE))


def drawn_values(space: Space, recipe: Recipe, draw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the drawn values by recipe key; lists and mappings as JSON."""
    columns = dict.fromkeys(space.drawn)
    if not draw:
        return columns
    try:
        found = recipe_values(space, draw, recipe)
    except (BadInputError, LookupError, TypeError):
        # An invalid draw; the trial has failed with this error.
        return columns
    simple = (int, float, str)
    return {
        key: value if isinstance(value, simple) or value is None else json.dumps(value)
        for key, value in {**columns, **found}.items()
    }
