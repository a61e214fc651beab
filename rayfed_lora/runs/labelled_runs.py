"""Runs of several folders and comparisons, labelled so as to differ. Source: this project."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs import seals
from rayfed_lora.runs.reading import RunData, path_of, read_errors, read_run
from rayfed_lora.storage import RunFolder

# Table of a comparison's runs.
_COMPARISON = "runs.parquet"
# Keys in which runs may differ and still be drawn as one curve.
_NOT_A_METHOD = ("seed", "storage", "runtime", "tracking")


@dataclass(frozen=True)
class FailedRun:
    """A run of a comparison that did not finish, and why."""

    label: str
    seed: int
    error: str


@dataclass(frozen=True)
class _Candidate:
    """A run and its possible labels.

    Attributes:
        run: as read.
        group: equal for runs that differ in the seed only.
        longer: labels to use, in turn, where the same label stands for several groups.
    """

    run: RunData
    group: str
    longer: Sequence[str]


def read_runs(locations: Sequence[str], *, own: bool = False) -> list[RunData]:
    """Read run folders, and all runs of comparisons' folders.

    Args:
        locations: folders or URIs.
        own: the user made the comparisons: their links may lead to runs elsewhere.

    Raises:
        RunFolderError: one is damaged, or holds no comparison and no run with a finished round.
    """
    found = [run for location in locations for run in _read(location, own)]
    if not found:
        raise RunFolderError(f"{', '.join(locations)}: expected finished runs, there is none")
    labels = _distinct_labels(found)
    return [replace(each.run, label=label) for label, each in zip(labels, found, strict=True)]


def read_failed(locations: Sequence[str]) -> list[FailedRun]:
    """Return the failed runs of those folders that are comparisons; RunFolderError: damaged."""
    folders = [folder for folder in map(RunFolder, locations) if folder.exists(_COMPARISON)]
    return [
        FailedRun(str(row["method"]), int(row["seed"]), str(row["error"]))
        for folder in folders
        for row in _cells(folder).query("error.notna()").to_dict("records")
    ]


def _cells(folder: RunFolder) -> pd.DataFrame:
    """Return method, seed and error of a comparison's runs; older comparisons have no seal."""
    with (
        read_errors(folder),
        seals.open_table(folder.confined(), _COMPARISON, seal_required=False) as file,
    ):
        cells: pd.DataFrame = pq.read_table(file, columns=["method", "seed", "error"]).to_pandas()
        return cells


def _read(location: str, own: bool) -> list[_Candidate]:
    folder = RunFolder(location)
    parts = path_of(folder).parts
    if folder.exists("recipe.yaml"):
        run = read_run(folder)
        return [_Candidate(run, _recipe_but_the_seed(run), _endings(parts, 3))]
    if not folder.exists(_COMPARISON):
        wanted = "the folder of a run (recipe.yaml) or of a comparison (runs.parquet)"
        raise RunFolderError(f"{location}: expected {wanted}")
    found = []
    for row in _cells(folder).query("error.isna()").to_dict("records"):
        method, seed = str(row["method"]), row["seed"]
        # Not the recorded location: the folder may have been moved.
        run = read_run(_folder_of_cell(folder, method, seed, own))
        group, longer = f"{location} {method}", _endings([*parts, method], 2)
        found.append(_Candidate(replace(run, label=method), group, longer))
    return found


def _folder_of_cell(folder: RunFolder, method: str, seed: int, own: bool) -> RunFolder:
    name = f"seed-{seed}"
    with read_errors(folder):
        # Raises where the name is a link that leads out of the confined folder.
        (folder if own else folder.confined()).exists(f"{method}/{name}")
        return RunFolder(child(folder.location, method, name))


def _recipe_but_the_seed(run: RunData) -> str:
    """Return what two runs must have in common to be drawn as one curve."""
    recipe = parse_yaml(run.location, run.recipe)
    return json.dumps({k: v for k, v in recipe.items() if k not in _NOT_A_METHOD})


def _endings(parts: Sequence[str], shortest: int) -> list[str]:
    """Return the endings of a path that have at least `shortest` parts.

    >>> _endings(["a", "b", "c"], 2)
    ['b/c', 'a/b/c']
    """
    return ["/".join(parts[-k:]) for k in range(min(shortest, len(parts)), len(parts) + 1)]


def _distinct_labels(found: Sequence[_Candidate]) -> list[str]:
    """Return a label for each run, longer where one label would stand for several groups."""
    labels = [each.run.label for each in found]
    for level in range(max(len(each.longer) for each in found)):
        runs = [(label, each.group) for label, each in zip(labels, found, strict=True)]
        groups = Counter(label for label, _ in set(runs))
        copies = Counter((run, each.run.seed) for run, each in zip(runs, found, strict=True))
        labels = [
            each.longer[level]
            if level < len(each.longer) and (groups[run[0]] > 1 or copies[run, each.run.seed] > 1)
            else run[0]
            for run, each in zip(runs, found, strict=True)
        ]
    return labels
