"""What a search has found: a row a trial, the front, and recipes to go on with.

Source: this project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from rayfed_lora.errors import BadInputError, RunError, RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.pages.csv_text import csv_bytes
from rayfed_lora.pages.plots import write_front
from rayfed_lora.pages.search import TRIALS_FILE, read_search, search_html
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import seals
from rayfed_lora.runs.checked import CheckedFolder
from rayfed_lora.runs.checksums import read_summary
from rayfed_lora.runs.reading import REPORT_FILE
from rayfed_lora.runs.tables import ROUNDS_FILE
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning import pareto
from rayfed_lora.tuning.run_folders import CHANGES_FILE, measured
from rayfed_lora.tuning.space import METRICS, Space

Standing = Literal["finished", "ended early", "failed", "unfinished"]


@dataclass(frozen=True)
class Tried:
    """A trial as Tune knows it.

    Attributes:
        trial: its id.
        draw: by key of the space; empty where it failed before it had one.
        metrics: last report; empty where there was none.
        error: why it failed, or None.
    """

    trial: str
    draw: Mapping[str, Any]
    metrics: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """A search's tables.

    Attributes:
        location: its folder.
        trials: rows of trials.parquet: trial, status, error, location, what was drawn by recipe
            key, last metrics, `on_front`.
        best: trial id by objective, and `knee` where there are several objectives.
    """

    location: str
    trials: pd.DataFrame
    best: Mapping[str, str]

    @property
    def front(self) -> pd.DataFrame:
        """The finished trials that no other beats in every objective."""
        return self.trials[self.trials["on_front"]]

    @classmethod
    def of(
        cls, location: str, space: Space, recipe: Recipe, tried: Sequence[Tried]
    ) -> SearchResult:
        """Read the trials' run folders.

        Only finished trials are compared: what an unfinished one has sent says nothing.

        Raises:
            RunError: no trial has finished.
        """
        rows = [_row(child(location, "trials", t.trial), space, recipe, t) for t in tried]
        trials = pd.DataFrame(rows)
        for key in space.drawn:
            # A column of Parquet has one type.
            if pd.api.types.infer_dtype(trials[key], skipna=True) in ("mixed", "mixed-integer"):
                trials[key] = trials[key].map(lambda value: None if value is None else str(value))
        names, modes = list(space.objectives), list(space.objectives.values())
        values = trials[names].to_numpy(np.float64)
        # A model that has diverged may have no loss.
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
            folder: of the search, as its owner writes it; None: `location`.

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
                f"# The values of its last rounds: it had others up to round {rounds}"
                f" (trials/{trial}/{CHANGES_FILE}), so a run of this recipe is another one."
            )
        return "\n".join([*heading, seals.text(folder, "recipe.yaml")])


def _row(location: str, space: Space, recipe: Recipe, tried: Tried) -> dict[str, Any]:
    summary: Mapping[str, Any] | None = None
    final: Mapping[str, Any] = {}
    error = tried.error
    try:
        summary, final = _outcome(RunFolder(location))
    except (RunFolderError, OSError, ValueError, LookupError) as damage:
        # One trial that cannot be read does not cost the others' table.
        error = str(damage)
    status: Standing = "unfinished"
    if summary is not None:
        status = "finished"
    elif error is not None:
        status = "failed"
    elif tried.metrics.get("done"):
        status = "ended early"
    row: dict[str, Any] = {
        "trial": tried.trial,
        "status": status,
        "error": error if status == "failed" else None,
        "location": location,
        **_settings(space, recipe, tried.draw),
    }
    # What Tune was told last may be of an earlier round, where a stop came between.
    metrics = {**tried.metrics, **final}
    row |= {name: metrics.get(name) for name in ("round", *METRICS, "warnings")}
    if summary is not None:
        row["best_accuracy"] = summary["best"]["eval_accuracy"]
        row["reduction_vs_fedavg"] = summary["communication"]["reduction_vs_fedavg"]
        row["wall_s"] = summary["timing"]["wall_s"]
    return row


def _outcome(folder: RunFolder) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Return a trial's summary and last metrics, None and nothing where it has not finished.

    Raises:
        RunFolderError, OSError, ValueError, LookupError: a file that the tables need is damaged.
    """
    summary = read_summary(folder)
    if summary is None:
        return None, {}
    files = CheckedFolder(folder)
    # The best trial's is a result, too.
    files.read("recipe.yaml")
    return summary, measured(files.table(ROUNDS_FILE))


def _settings(space: Space, recipe: Recipe, draw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was drawn, by recipe key; values of several kinds as JSON."""
    columns = dict.fromkeys(space.drawn)
    if not draw:
        return columns
    try:
        found = space.settings(draw, recipe)
    except (BadInputError, LookupError, TypeError):
        # A bad sample; the trial's error says so.
        return columns
    simple = (int, float, str)
    return {
        key: value if isinstance(value, simple) or value is None else json.dumps(value)
        for key, value in {**columns, **found}.items()
    }
