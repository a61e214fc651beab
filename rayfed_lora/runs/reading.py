"""One run as reports show it, read from its folder. Source: this project."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs import checksums, seals
from rayfed_lora.runs.checked import CheckedFolder, table
from rayfed_lora.runs.checksums import SUMMARY_FILE
from rayfed_lora.runs.client_rows import CLIENT_METRICS_FILE, CLIENT_NAME, NOTES_FILE
from rayfed_lora.runs.tables import CLIENTS_FILE, PARTITION_FILE, ROUNDS_FILE
from rayfed_lora.storage import RunFolder

# Most failures, and most notes, that are read.
_MOST_ROWS = 200
_SEED = re.compile(r"seed-\d+")


@dataclass(frozen=True)
class RunData:
    """One run as a report shows it.

    Attributes:
        label: name in the report; runs with the same label differ in the seed and share a curve.
        location: its folder.
        recipe: content of recipe.yaml.
        name, method, seed: of the recipe.
        summary: content of summary.json; None where the run has not finished.
        rounds: rows of rounds.parquet, with `bytes_so_far`, up and down, and `simulated_so_far`.
        failures: round, client (with its name) and error of the first failed updates.
        failed: number of failed updates.
        tests: rows of client_metrics.parquet of the last tested round; may be empty.
        partition: client, label and examples of a sample of the clients; may be empty.
        notes: round and text of the first notes; may be empty.
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


def read_run(folder: RunFolder, summary: Mapping[str, Any] | None = None) -> RunData:
    """Read one run; `summary` is what summary.json is about to hold, None: read it if it exists.

    Raises RunFolderError where the run has no finished round, or is damaged.
    """
    checked = CheckedFolder(folder)
    folder = checked.folder
    if not checked.exists(ROUNDS_FILE):
        raise RunFolderError(f"{folder.location}: expected a run with a finished round")
    with read_errors(folder):
        if summary is None and checked.exists(SUMMARY_FILE):
            summary = checksums.read_summary(folder)
        recipe = seals.text(folder, "recipe.yaml")
        values = parse_yaml(folder.location, recipe)
        failed, failures = _failures(checked)
        return RunData(
            label=path_of(folder).name,
            location=folder.location,
            recipe=recipe,
            name=values["name"],
            method=values["method"],
            seed=int(values["seed"]),
            summary=summary,
            rounds=_with_sums(checked.table(ROUNDS_FILE).to_pandas()),
            failures=failures,
            failed=failed,
            tests=_last_tests(checked),
            partition=_table(checked, PARTITION_FILE),
            # Last: all tables have been read, and are noted where they lack a checksum.
            notes=_with_warning(_table(checked, NOTES_FILE), checked.unchecked).head(_MOST_ROWS),
        )


def task_of(folder: RunFolder) -> str:
    """Return `model.task` of a run; raises RunFolderError where its recipe cannot be read."""
    with read_errors(folder):
        values = parse_yaml(folder.location, seals.text(folder, "recipe.yaml"))
        return str(values["model"]["task"])


def rounds_so_far(folder: RunFolder) -> pd.DataFrame:
    """Return rounds.parquet with `bytes_so_far`, up and down, and `simulated_so_far`.

    Raises RunFolderError where it is missing or damaged; ValueError, LookupError for another table.
    """
    return _with_sums(table(folder, ROUNDS_FILE).to_pandas())


def path_of(folder: RunFolder) -> PurePosixPath:
    """Return the path of a run folder; for a run of a comparison that of the method's folder."""
    path = PurePosixPath(folder.place[1])
    return path.parent if _SEED.fullmatch(path.name) else path


@contextmanager
def read_errors(folder: RunFolder) -> Iterator[None]:
    """Convert the errors of unexpected files to a RunFolderError that names the folder."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunFolderError(f"{folder.location} cannot be read: {reason}") from error


def _table(checked: CheckedFolder, name: str) -> pd.DataFrame:
    if not checked.exists(name):
        return pd.DataFrame()
    found: pd.DataFrame = checked.table(name).to_pandas()
    return found


def _with_warning(notes: pd.DataFrame, unchecked: Sequence[str]) -> pd.DataFrame:
    """Return the notes of a run, preceded by one about tables without a checksum."""
    if not unchecked:
        return notes
    text = f"written by an older version, without checksums: {', '.join(sorted(set(unchecked)))}"
    return pd.concat([pd.DataFrame({"round": [0], "text": [text]}), notes], ignore_index=True)


def _with_sums(rounds: pd.DataFrame) -> pd.DataFrame:
    rounds["bytes_so_far"] = (rounds["bytes_up"] + rounds["bytes_down"]).cumsum()
    # Runs of earlier versions have no such column.
    simulated_s = rounds.get("simulated_s", pd.Series(np.nan, rounds.index))
    rounds["simulated_so_far"] = simulated_s.astype(float).cumsum()
    return rounds


def _failures(folder: CheckedFolder) -> tuple[int, pd.DataFrame]:
    with folder.open(CLIENTS_FILE) as source:
        wanted = ("round", "client", "error", CLIENT_NAME)
        columns = [name for name in wanted if name in pq.read_schema(source).names]
        failed = pq.read_table(source, columns=columns, filters=[("status", "==", "failed")])
    return failed.num_rows, failed.slice(0, _MOST_ROWS).to_pandas()


def _last_tests(folder: CheckedFolder) -> pd.DataFrame:
    """Return the tests on clients after the last tested round; reads no other rounds."""
    if not folder.exists(CLIENT_METRICS_FILE):
        return pd.DataFrame()
    with folder.open(CLIENT_METRICS_FILE) as source:
        last = pc.max(pq.read_table(source, columns=["round"])["round"])
        source.seek(0)
        tests: pd.DataFrame = pq.read_table(source, filters=pc.field("round") == last).to_pandas()
        return tests
