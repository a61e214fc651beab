"""What reports show of runs, read from their folders. Source: this project."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs import checksums, seals
from rayfed_lora.runs.checked import CheckedFolder, table
from rayfed_lora.runs.checksums import SUMMARY_FILE
from rayfed_lora.runs.client_rows import CLIENT_METRICS_FILE, CLIENT_NAME, NOTES_FILE
from rayfed_lora.runs.tables import CLIENTS_FILE, PARTITION_FILE, ROUNDS_FILE
from rayfed_lora.storage import RunFolder

REPORT_FILE = "report.html"
# Keys in which runs may differ and still be drawn as one.
_NOT_A_METHOD = ("seed", "storage", "runtime", "tracking")


@dataclass(frozen=True)
class RunData:
    """One run as a report shows it.

    Attributes:
        label: what to call it; runs of one label differ in the seed and are drawn together.
        location: its folder.
        recipe: content of recipe.yaml.
        name, method, seed: of the recipe.
        summary: content of summary.json; None where the run has not finished.
        rounds: rows of rounds.parquet, with `bytes_so_far`, up and down, and `simulated_so_far`.
        failures: round, client (with its name) and error of each failed update, the first of them.
        failed: number of failed updates.
        tests: rows of client_metrics.parquet of the last tested round; may be empty.
        partition: client, label and examples of clients that stand for all; may be empty.
        notes: round and text of what the user should know, the first of them; may be empty.
    """

    label: str
    location: str
    recipe: str
    name: str
    method: str
    seed: int
    summary: Mapping[str, Any] | None
    rounds: pd.DataFrame
    failures: pd.DataFrame
    failed: int
    tests: pd.DataFrame
    partition: pd.DataFrame
    notes: pd.DataFrame


@dataclass(frozen=True)
class FailedRun:
    """A run of a comparison that did not finish, and why."""

    label: str
    seed: int
    error: str


_MOST_FAILURES = 200
_SEED = re.compile(r"seed-\d+")
# Table of a comparison's runs.
_COMPARISON = "runs.parquet"


def read_runs(locations: Sequence[str], *, own: bool = False) -> list[RunData]:
    """Read run folders, and all runs of comparisons' folders.

    Args:
        locations: folders or URIs.
        own: links to runs of a comparison elsewhere are its user's own, not a stranger's.

    Raises:
        RunFolderError: one holds neither a run with a finished round nor a comparison, or is
            damaged.
    """
    found = [each for location in locations for each in _read(location, own)]
    if not found:
        raise RunFolderError(f"{', '.join(locations)}: expected finished runs, there is none")
    return _told_apart(found)


def read_failed(locations: Sequence[str]) -> list[FailedRun]:
    """Return the failed runs of those folders that are comparisons.

    Raises:
        RunFolderError: one is damaged.
    """
    folders = [folder for folder in map(RunFolder, locations) if folder.exists(_COMPARISON)]
    return [
        FailedRun(str(row["method"]), int(row["seed"]), str(row["error"]))
        for folder in folders
        for row in _cells(folder).query("error.notna()").to_dict("records")
    ]


def _cells(folder: RunFolder) -> pd.DataFrame:
    with _readable(folder), seals.opened(folder.confined(), _COMPARISON) as file:
        found: pd.DataFrame = pq.read_table(file, columns=["method", "seed", "error"]).to_pandas()
        return found


@dataclass(frozen=True)
class _Found:
    """A run, what its label stands for, and longer labels.

    Attributes:
        run: as read.
        group: equal for runs that differ in the seed only.
        longer: labels to take, in turn, where another group has the same one.
    """

    run: RunData
    group: str
    longer: Sequence[str]


def _endings(parts: Sequence[str], shortest: int) -> list[str]:
    """Return the last parts of a path, `shortest` of them or more.

    >>> _endings(["a", "b", "c"], 2)
    ['b/c', 'a/b/c']
    """
    return ["/".join(parts[-k:]) for k in range(min(shortest, len(parts)), len(parts) + 1)]


def _read(location: str, own: bool) -> list[_Found]:
    folder = RunFolder(location)
    if folder.exists("recipe.yaml"):
        run = read_run(folder)
        return [_Found(run, _all_but_the_seed(run), _endings(_path(folder).parts, 3))]
    if not folder.exists(_COMPARISON):
        raise RunFolderError(
            f"{location}: expected the folder of a run (recipe.yaml) or of a comparison"
            " (runs.parquet)"
        )
    finished = _cells(folder).query("error.isna()")
    cells = [(str(m), s) for m, s in zip(finished["method"], finished["seed"], strict=True)]
    parts = _path(folder).parts
    # Not by the recorded location: the folder may have been moved.
    return [
        _Found(
            replace(read_run(RunFolder(_of_cell(location, m, s, own))), label=m),
            f"{location} {m}",
            _endings([*parts, m], 2),
        )
        for m, s in cells
    ]


def _of_cell(location: str, method: str, seed: int, own: bool) -> str:
    folder, name = RunFolder(location), f"{method}/seed-{seed}"
    with _readable(folder):
        # Refused where it is a link to somewhere else.
        (folder if own else folder.confined()).exists(name)
        return child(location, method, f"seed-{seed}")


def _all_but_the_seed(run: RunData) -> str:
    """Return what two runs must have in common to be drawn as one."""
    facts = parse_yaml(run.location, run.recipe)
    return json.dumps({k: v for k, v in facts.items() if k not in _NOT_A_METHOD})


def read_run(folder: RunFolder, summary: Mapping[str, Any] | None = None) -> RunData:
    """Read one run.

    Args:
        folder: of the run.
        summary: what is about to be its summary.json; None: read that, where it is there.

    Raises:
        RunFolderError: it has no finished round, or is damaged.
    """
    checked = CheckedFolder(folder)
    folder = checked.folder
    if not checked.exists(ROUNDS_FILE):
        raise RunFolderError(f"{folder.location}: expected a run with a finished round")
    with _readable(folder):
        if summary is None and checked.exists(SUMMARY_FILE):
            summary = checksums.summary(folder)
        recipe = seals.text(folder, "recipe.yaml")
        facts = parse_yaml(folder.location, recipe)
        failed, failures = _failures(checked)
        rounds = _with_sums(checked.table(ROUNDS_FILE).to_pandas())
        tests = _last_tests(checked)
        partition, notes = _table(checked, PARTITION_FILE), _table(checked, NOTES_FILE)
        return RunData(
            label=_path(folder).name,
            location=folder.location,
            recipe=recipe,
            name=facts["name"],
            method=facts["method"],
            seed=int(facts["seed"]),
            summary=summary,
            rounds=rounds,
            failures=failures,
            failed=failed,
            tests=tests,
            partition=partition,
            notes=_with_doubt(notes, checked.unchecked).head(_MOST_FAILURES),
        )


def _path(folder: RunFolder) -> PurePosixPath:
    """Return where a run is; of a comparison's runs the folder of the method."""
    path = PurePosixPath(folder.place[1])
    return path.parent if _SEED.fullmatch(path.name) else path


@contextmanager
def _readable(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{folder.location} cannot be read: {error}") from error


def _table(checked: CheckedFolder, name: str) -> pd.DataFrame:
    if not checked.exists(name):
        return pd.DataFrame()
    found: pd.DataFrame = checked.table(name).to_pandas()
    return found


def _with_doubt(notes: pd.DataFrame, unchecked: Sequence[str]) -> pd.DataFrame:
    """Return the notes of a run, the first one about tables that nothing vouches for."""
    if not unchecked:
        return notes
    text = f"written by an older version, without checksums: {', '.join(sorted(set(unchecked)))}"
    return pd.concat([pd.DataFrame({"round": [0], "text": [text]}), notes], ignore_index=True)


def rounds_so_far(folder: RunFolder) -> pd.DataFrame:
    """Return the rows of rounds.parquet with `bytes_so_far`, up and down, and `simulated_so_far`.

    Raises:
        RunFolderError: it is missing or damaged.
        ValueError, LookupError: it is no such table.
    """
    return _with_sums(table(folder, ROUNDS_FILE).to_pandas())


def _with_sums(rounds: pd.DataFrame) -> pd.DataFrame:
    rounds["bytes_so_far"] = (rounds["bytes_up"] + rounds["bytes_down"]).cumsum()
    # Runs of earlier versions have no such column.
    rounds["simulated_so_far"] = rounds.get("simulated_s", np.nan)
    rounds["simulated_so_far"] = rounds["simulated_so_far"].astype(float).cumsum()
    return rounds


def _failures(folder: CheckedFolder) -> tuple[int, pd.DataFrame]:
    with folder.opened(CLIENTS_FILE) as source:
        wanted = ("round", "client", "error", CLIENT_NAME)
        columns = [name for name in wanted if name in pq.read_schema(source).names]
        failed = pq.read_table(source, columns=columns, filters=[("status", "==", "failed")])
    return failed.num_rows, failed.slice(0, _MOST_FAILURES).to_pandas()


def _last_tests(folder: CheckedFolder) -> pd.DataFrame:
    """Return the tests on clients after the last tested round, and read no others."""
    if not folder.exists(CLIENT_METRICS_FILE):
        return pd.DataFrame()
    with folder.opened(CLIENT_METRICS_FILE) as source:
        last = pc.max(pq.read_table(source, columns=["round"])["round"])
        source.seek(0)
        tests: pd.DataFrame = pq.read_table(source, filters=pc.field("round") == last).to_pandas()
        return tests


def _told_apart(found: Sequence[_Found]) -> list[RunData]:
    """Return the runs, with longer labels where one label would stand for several things."""
    labels = [each.run.label for each in found]
    for level in range(max(len(each.longer) for each in found)):
        runs = list(zip(labels, found, strict=True))
        copies = Counter((label, each.group, each.run.seed) for label, each in runs)
        groups: dict[str, set[str]] = {}
        for label, each in runs:
            groups.setdefault(label, set()).add(each.group)
        labels = [
            each.longer[level]
            if level < len(each.longer)
            and (len(groups[label]) > 1 or copies[label, each.group, each.run.seed] > 1)
            else label
            for label, each in runs
        ]
    return [replace(each.run, label=label) for label, each in zip(labels, found, strict=True)]


def accuracies_of_clients(runs: Sequence[RunData]) -> dict[str, npt.NDArray[Any]]:
    """Return the accuracies of the last models on clients' own examples, by label.

    Where clients have models of their own, theirs too, by the label with "(own models)".
    """
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for run in runs:
        kinds = {"accuracy": run.label, "personal_accuracy": f"{run.label} (own models)"}
        for column, label in kinds.items():
            if column in run.tests and run.tests[column].notna().any():
                found.setdefault(label, []).append(run.tests[column].dropna().to_numpy())
    return {label: np.concatenate(parts) for label, parts in found.items()}
