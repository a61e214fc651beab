"""Table of trials, Pareto front and best recipes of a search. Source: this project."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from rayfed_lora.errors import RunError
from rayfed_lora.locations import child
from rayfed_lora.pages.csv_text import csv_bytes
from rayfed_lora.pages.plots import write_front
from rayfed_lora.pages.search import TRIALS_FILE, read_search, search_html
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import seals
from rayfed_lora.runs.checksums import REPORT_FILE
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning import pareto
from rayfed_lora.tuning.run_folders import CHANGES_FILE
from rayfed_lora.tuning.space import Space
from rayfed_lora.tuning.trial_rows import TrialOutcome, trial_row


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
        rows = [trial_row(child(location, "trials", t.trial), space, recipe, t) for t in outcomes]
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

        Args:
            space: of the search.
            folder: the search's folder, guarded by the lease; None: `location`, unguarded.

        Raises:
            RunError: the folder cannot be written.
        """
        folder = folder or RunFolder(self.location)
        table = pa.Table.from_pandas(self.trials, preserve_index=False)
        seals.write_table(folder, TRIALS_FILE, table)
        folder.write("trials.csv", csv_bytes(self.trials))
        for i, (name, trial) in enumerate(self.best.items()):
            content = self._recipe_of(name, trial).encode()
            folder.write(f"best-{name}.yaml", content)
            if i == 0:
                folder.write("best.yaml", content)
        names = list(space.objectives)
        if len(names) > 1:
            write_front(folder, self.trials, names[0], names[1])
        folder.write(REPORT_FILE, search_html(read_search(folder)).encode())

    def _recipe_of(self, name: str, trial: str) -> str:
        folder = RunFolder(child(self.location, "trials", trial))
        row = self.trials.set_index("trial").loc[trial]
        heading = [f"# The best trial of a search by {name}: {trial}"]
        heading += [
            f"# {metric}: {row[metric]:.6g}" for metric in self.best if metric in self.trials
        ]
        if folder.exists(CHANGES_FILE):
            changes = json.loads(folder.read(CHANGES_FILE))
            rounds = ", ".join(str(change["after_round"]) for change in changes)
            heading.append(
                f"# These are the values of its last rounds; they were others up to round {rounds}"
                f" (trials/{trial}/{CHANGES_FILE}), so a run of this recipe has another result."
            )
        return "\n".join([*heading, seals.text(folder, "recipe.yaml")])
