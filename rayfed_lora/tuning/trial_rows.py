"""A row for each trial: its run folder and last report. Source: this project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayfed_lora.errors import BadInputError, RunFolderError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checked import CheckedFolder
from rayfed_lora.runs.checksums import read_summary
from rayfed_lora.runs.tables import ROUNDS_FILE
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.draws import recipe_values
from rayfed_lora.tuning.run_folders import measured
from rayfed_lora.tuning.space import METRICS, Space

Status = Literal["finished", "ended early", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialOutcome:
    """The end of a trial as Tune reports it.

    Attributes:
        trial: id of the trial.
        draw: values by key of the space; empty where the trial failed before its draw.
        metrics: last report; empty where there was none.
        error: reason of the failure, or None.
    """

    trial: str
    draw: Mapping[str, Any]
    metrics: Mapping[str, Any]
    error: str | None = None


def trial_row(location: str, space: Space, recipe: Recipe, outcome: TrialOutcome) -> dict[str, Any]:
    """Return a row of trials.parquet; a trial with a damaged folder at `location` has failed."""
    summary: Mapping[str, Any] | None = None
    final: Mapping[str, Any] = {}
    error = outcome.error
    try:
        summary, final = _results(RunFolder(location))
    except (RunFolderError, OSError, ValueError, LookupError) as damage:
        error = str(damage)
    status: Status = "unfinished"
    if summary is not None:
        status = "finished"
    elif error is not None:
        status = "failed"
    elif outcome.metrics.get("done"):
        status = "ended early"
    row: dict[str, Any] = {
        "trial": outcome.trial,
        "status": status,
        "error": error if status == "failed" else None,
        "location": location,
        **_drawn_values(space, recipe, outcome.draw),
    }
    # After a stop, the last report to Tune may be older than the run folder.
    metrics = {**outcome.metrics, **final}
    row |= {name: metrics.get(name) for name in ("round", *METRICS, "warnings")}
    if summary is not None:
        row["best_accuracy"] = summary["best"]["eval_accuracy"]
        row["reduction_vs_fedavg"] = summary["communication"]["reduction_vs_fedavg"]
        row["wall_s"] = summary["timing"]["wall_s"]
    return row


def _results(folder: RunFolder) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Return a trial's summary and last metrics; None and empty where it has not finished.

    Raises:
        RunFolderError, OSError, ValueError, LookupError: a file is damaged.
    """
    summary = read_summary(folder)
    if summary is None:
        return None, {}
    files = CheckedFolder(folder)
    # Checked since the best trial's recipe is part of the result.
    files.read("recipe.yaml")
    return summary, measured(files.table(ROUNDS_FILE))


def _drawn_values(space: Space, recipe: Recipe, draw: Mapping[str, Any]) -> dict[str, Any]:
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
